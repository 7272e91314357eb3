"""How a cache stores log-probabilities: error bounds, mass at most 1, entries left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_kd.draws import draws_of, merged, thresholds
from fused_kd.training.codes import (
    decode,
    decode_ids,
    encode,
    encode_ids,
    id_bits,
    id_dtype,
    ids_are_packed,
    packed_bytes,
)
from fused_kd.training.drawn_codes import decode_draws, encode_draws, ids_of


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


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2**31), st.integers(0, 40), st.integers(0, 5))
def test_ids_come_back(seed: int, vocab_size: int, k: int, tokens: int) -> None:
    """The least and the largest among them; each token by itself too; in no more bits than they need."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, (tokens, k))
    ids[:, :1], ids[:, -1:] = 0, vocab_size - 1
    arrays = encode_ids(ids, vocab_size)
    ((name, array),) = arrays.items()
    bytes_a_token = array.nbytes // max(tokens, 1)
    assert (array.shape[0] == tokens and bytes_a_token <= packed_bytes(k, vocab_size)) or name == "indices"
    assert bytes_a_token <= k * id_dtype(vocab_size).itemsize
    found = decode_ids(arrays, k, vocab_size)
    assert found.dtype == np.int64 and np.array_equal(found, ids)
    for token in range(tokens):
        assert np.array_equal(decode_ids({name: array[token : token + 1]}, k, vocab_size), ids[token : token + 1])


@pytest.mark.parametrize(
    "vocab_size, bits, name, size",
    [(1, 1, "packed_ids", 8), (2, 1, "packed_ids", 8), (3, 2, "packed_ids", 16), (32_000, 15, "packed_ids", 120),
     (49_152, 16, "indices", 128), (65_536, 16, "indices", 128), (65_537, 17, "packed_ids", 136),
     (128_256, 17, "packed_ids", 136), (151_936, 18, "packed_ids", 144)],
)  # fmt: skip
def test_bits_of_an_id(vocab_size: int, bits: int, name: str, size: int) -> None:
    """Of 64 ids; a single one of 15 bits has two bytes either way."""
    arrays = encode_ids(np.zeros((2, 64), dtype=np.int32), vocab_size)
    assert id_bits(vocab_size) == bits and {name: array.nbytes for name, array in arrays.items()} == {name: 2 * size}
    assert ids_are_packed(1, vocab_size) == (bits <= 8 or bits > 16)


def test_ids_are_packed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, 128_256, (50, 7)).astype(np.int32)
    whole = encode_ids(ids, 128_256)["packed_ids"]
    monkeypatch.setattr("fused_kd.training.codes._PACKED_AT_ONCE", 20)
    assert np.array_equal(encode_ids(ids, 128_256)["packed_ids"], whole)


def test_ids_that_cannot_be_packed() -> None:
    for wrong in (-1, 300):
        with pytest.raises(ValueError, match=r"ids must be in \[0, 299\]"):
            encode_ids(np.array([[0, wrong]]), 300)


@pytest.mark.parametrize("dtype, apart", [("fp32", 2e-6), ("fp16", 2e-3), ("8bit", 3e-2)])
@pytest.mark.parametrize("k, n", [(0, 12), (5, 12), (5, 1)])
@pytest.mark.parametrize("V", [300, 70_000])
def test_drawn_lists_come_back(V: int, k: int, n: int, dtype: str, apart: float) -> None:
    """The same entries; what is drawn has the share of the rest that it was drawn with."""
    z = torch.randn(20, V) * 3
    z[3, 1:], z[4, 4:] = -math.inf, -math.inf  # fewer than k entries, and nothing to draw
    made = draws_of(z, thresholds(20, n, torch.Generator().manual_seed(0), z.device), k=k)
    exact, ids = merged(made)
    arrays = encode_draws(made.log_probs.numpy(), ids_of(made).numpy(), dtype, V)
    assert sum(array.nbytes for array in arrays.values()) <= 20 * (
        4 * (k + n) + {"fp32": 4 * k, "fp16": 2 * k, "8bit": k + 8}[dtype]
    )
    found, found_ids = decode_draws(arrays, k, n, V)
    assert found.shape == found_ids.shape == (20, k + n)
    assert torch.equal(found_ids, ids.where(exact > -math.inf, -1)) and torch.equal(found == -math.inf, found_ids < 0)
    distance = (found.exp() - exact.exp()).abs()
    assert float(distance.max()) < apart and float((found.double().exp().sum(1) - 1).abs().max()) < 1e-3
    if k == 0:
        assert float(distance.max()) < 1e-6, "a share is exact"
