"""How a cache stores log-probabilities: error bounds, mass at most 1, entries left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_kd.training.codes import decode, encode


@st.composite
def lists(draw) -> np.ndarray:
    """(N, K) log-probabilities of the largest of V entries, some left out; from flat to certain."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    V = draw(st.integers(1, 300))
    K = draw(st.integers(1, V))
    logits = rng.normal(size=(4, V)) * draw(st.sampled_from([0.0, 1e-3, 1.0, 4.0, 30.0, 1e4]))
    full = torch.tensor(logits, dtype=torch.float32).log_softmax(-1).topk(K).values.numpy().copy()
    full[:, 1:][rng.random((4, K - 1)) < draw(st.sampled_from([0.0, 0.3]))] = -np.inf
    return full


@settings(max_examples=150, deadline=None)
@given(lists(), st.sampled_from(["fp16", "8bit", "fp32"]))
def test_codes_keep_their_bounds(exact: np.ndarray, dtype: str) -> None:
    stored = decode(encode(exact, dtype))
    assert stored.dtype == np.float32 and stored.max() <= 0
    total, before = np.exp(stored.astype(np.float64)).sum(1), np.exp(exact.astype(np.float64)).sum(1)
    assert (total <= 1).all()
    listed = exact > (-65504 if dtype == "fp16" else -np.inf)  # fp16's range
    assert ((stored > -np.inf) == listed).all()
    finite = np.where(listed, exact.astype(np.float64), exact[:, :1])
    error = np.abs(np.where(listed, stored, finite) - finite)
    if dtype == "8bit":
        distance = finite[:, :1] - finite
        span = distance.max(1, keepdims=True)
        assert (error <= span / 127 + 1e-5 * (1 + np.abs(finite))).all()
        assert np.allclose(total, np.minimum(before, 1), atol=1e-6), "the mass is kept"
        # half a step at sqrt(distance / span), and as much again as the worst of them for the common shift
        step = span * (np.rint(254 * np.sqrt(distance / np.maximum(span, 1e-30))) + 0.25) / 254**2
        assert (error <= step + step.max(1, keepdims=True) + 1e-5 * (1 + np.abs(finite))).all()
    else:
        unit = 2.0**-10 if dtype == "fp16" else 2.0**-22
        assert (error <= np.abs(finite) * unit + 2.0**-20).all()


def test_codes_at_a_realistic_size() -> None:
    """k=64 of 32,000, logits of standard deviation 3: the worst entry in nats, and half the probability that moves."""
    torch.manual_seed(0)
    exact = (torch.randn(500, 32_000) * 3).log_softmax(-1).topk(64).values.numpy()
    for dtype, nats, moved in (("fp16", 4e-3, 5e-4), ("8bit", 4e-2, 2.5e-3), ("fp32", 1e-6, 1e-6)):
        stored = decode(encode(exact, dtype))
        assert np.abs(stored - exact).max() < nats
        assert np.abs(np.exp(stored) - np.exp(exact)).sum(1).max() / 2 < moved


@pytest.mark.parametrize("dtype", ["fp16", "8bit", "fp32"])
def test_a_log_probability_of_one_rounded_up(dtype: str) -> None:
    assert (decode(encode(np.array([[1e-7, -np.inf]], dtype=np.float32), dtype)) <= 0).all()


def test_bad_lists() -> None:
    for values in ([[0.1]], [[math.nan]], [[-math.inf]], [[-0.1, -0.2]]):
        with pytest.raises(ValueError, match="log_probs of token 0 must be at most 0"):
            encode(np.array(values, dtype=np.float32), "fp16")
    with pytest.raises(ValueError, match="dtype must be one of 'fp16', '8bit', 'fp32', got 'int8'"):
        encode(np.zeros((1, 1), dtype=np.float32), "int8")
