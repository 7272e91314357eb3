"""The row of a vocabulary slice: ranks run in turns in one process, against the row that has the whole vocabulary."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_kd as fk
from fused_kd.rows.contract import Logits, RowInputs, RowOutputs, Sparse
from fused_kd.rows.select import get_row
from fused_kd.rows.top_k import sparse_teacher
from fused_kd.terms import ENTROPY

from ..problems import NAMES, OBJECTIVES, label, relative, summands
from .contract import KINDS, scalars_of
from .ways import in_turns, outputs, refused

BACKENDS = ["torch", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [])]
FORMS = ("dense", "renormalize", "bucket", "uniform", "listed")
TIGHT = 2e-6


def whole(inputs: RowInputs, dtype: torch.dtype = torch.float32) -> RowOutputs:
    out = outputs(*inputs.student.raw.shape, dtype, 0.0, inputs.labels.device)
    get_row("torch")(inputs, out)
    return out


def inputs_of(
    objective,
    form: str = "dense",
    C: int = 23,
    V: int = 61,
    *,
    std: float = 2.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    weighted: bool = False,
    seed: int = 0,
) -> RowInputs:
    g = torch.Generator().manual_seed(seed)
    z, z_t = (std * torch.randn(C, V, generator=g) for _ in range(2))
    labels = torch.where(torch.rand(C, generator=g) < 0.5, z_t.argmax(1), torch.randint(0, V, (C,), generator=g))
    labels[torch.rand(C, generator=g) < 0.2] = -1
    teacher: Logits | Sparse | None = Logits(z_t, 1.0, None, False)
    if form != "dense":
        values, indices = z_t.log_softmax(1).topk(min(5, V))
        if V > 5:
            values[::3, -1] = -math.inf
        teacher, malformed = sparse_teacher(
            values, indices, labels, V, form, temperature=temperature if form == "bucket" else 1.0
        )
        assert not malformed.any()
    spec = objective.spec
    hard = torch.rand(C, generator=g) < 0.4 if spec.ranked else None
    return RowInputs(
        Logits(z, scale, softcap, False),
        teacher if spec.needs_teacher else None,
        labels,
        torch.rand(C, generator=g) if weighted else None,
        scalars_of(objective, temperature),
        spec,
        spec.has_cold(temperature == 1.0, form),
        hard,
    )


def allowed(objective, form: str, backend: str = "torch") -> bool:
    if backend == "triton" and (form != "dense" or "adaptive_kl" in summands(objective)):
        return False
    if objective.spec.gate == ENTROPY:
        return False
    return form == "dense" or not objective.spec.needs_teacher or not refused(objective.spec, form)


def compare(
    inputs: RowInputs,
    sizes: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    tight: float = TIGHT,
    backend: str = "torch",
):
    expected, found = whole(inputs, dtype), in_turns(inputs, sizes, dtype, backend)
    gradient = torch.cat([out.dlogits for out in found], 1)
    for out in found:
        assert torch.equal(out.is_hard, expected.is_hard)
        assert torch.equal(out.loss, found[0].loss) and torch.equal(out.difficulty, found[0].difficulty)
    assert relative(found[0].loss, expected.loss) < tight
    assert (found[0].difficulty - expected.difficulty).abs().max() < 1e-5 * expected.difficulty.abs().max()
    rounding = 4e-3 if backend == "torch" else 8e-3  # Triton's interpreter cuts off instead of rounding
    assert relative(gradient, expected.dlogits) < (tight if dtype == torch.float32 else rounding)


def rows(backend: str) -> int:
    return 23 if backend == "torch" else 4


def combinations(forms: Sequence[str] = FORMS) -> list:
    """Of objective, teacher form and backend, all that the loss does not refuse.

    In the interpreter the kinds that steer the kernels differently; the others in make test-all.
    """
    return [
        pytest.param(
            objective,
            form,
            backend,
            id=f"{label(objective)}-{form}-{backend}",
            marks=[pytest.mark.exhaustive] if backend == "triton" and label(objective) not in KINDS else [],
        )
        for objective in OBJECTIVES
        for form in forms
        for backend in BACKENDS
        if allowed(objective, form, backend)
    ]


@pytest.mark.parametrize("objective, form, backend", combinations())
def test_slices_against_the_whole(objective, form: str, backend: str) -> None:
    slices = ([61], [30, 31], [1, 0, 50, 10], [0, 20, 41])
    for sizes in slices if backend == "torch" else slices[2:3]:  # an interpreted row takes a tenth of a second
        compare(inputs_of(objective, form, rows(backend)), sizes, backend=backend)


@pytest.mark.parametrize("objective, form, backend", combinations())
def test_temperature(objective, form: str, backend: str) -> None:
    compare(inputs_of(objective, form, rows(backend), temperature=2.0), [1, 60], backend=backend)


@pytest.mark.parametrize("objective, form, backend", combinations())
def test_scale_softcap_weights_and_bf16(objective, form: str, backend: str) -> None:
    inputs = inputs_of(objective, form, rows(backend), softcap=3.0, scale=0.5, weighted=True)
    compare(inputs, [20, 41], backend=backend)
    inputs = inputs_of(objective, form, rows(backend), scale=2.0, weighted=True)
    compare(inputs, [20, 41], dtype=torch.bfloat16, backend=backend)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_without_looking_at_values(objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where a look at a value would wait."""
    inputs = inputs_of(objective)
    expected = whole(inputs)
    for module in ("torch.math", "sharded"):
        monkeypatch.setattr(f"fused_kd.rows.{module}.on_host", lambda x: False)
    for form in FORMS:
        if allowed(objective, form):
            found = in_turns(inputs_of(objective, form), [30, 31])
            assert all(out.dlogits.isfinite().all() for out in found)
            if form == "dense":
                assert relative(torch.cat([out.dlogits for out in found], 1), expected.dlogits) < TIGHT
                assert relative(found[0].loss, expected.loss) < TIGHT


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("objective", [fk.SFT(), fk.GeneralizedJSD(), fk.TotalVariation(), fk.NoEvo()], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_z_loss_beside_it(objective, temperature: float, backend: str) -> None:
    """Of log-sum-exps of both signs, whose multiple of q is then negative."""
    inputs = inputs_of(objective + 0.1 * fk.ZLoss(), C=4, temperature=temperature)
    inputs.student.raw[1:3] -= 9.0
    compare(inputs, [20, 41], backend=backend)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")
def test_blocks_of_a_long_slice() -> None:
    """Longer than a block of the kernels, which the last one does not fill."""
    compare(inputs_of(fk.SelfEvolution(gamma=1.0), C=3, V=7000), [2049, 4951], backend="triton")


@pytest.mark.parametrize("form", ["renormalize", "bucket"])
@pytest.mark.parametrize("sizes", [[0, 3], [3, 0], [0, 0, 2]], ids=str)
def test_a_rank_without_columns_beside_one_whose_columns_are_all_listed(sizes: list[int], form: str) -> None:
    for seed in range(3):
        compare(inputs_of(fk.ForwardKD(lam=0.3), form, 4, sum(sizes), seed=seed), sizes, tight=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(OBJECTIVES),
    st.sampled_from(FORMS),
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from([0.5, 4.0, 30.0]),
    st.integers(0, 1000),
)
def test_any_slices(objective, form: str, sizes: list[int], C: int, std: float, seed: int) -> None:
    if sum(sizes) == 0 or not allowed(objective, form):
        return
    inputs = inputs_of(objective, form, C, sum(sizes), std=std, seed=seed)
    expected, found = whole(inputs), in_turns(inputs, sizes)
    gradient = torch.cat([out.dlogits for out in found], 1)
    floor = 1e-6 * std * C
    assert all(torch.equal(out.loss, found[0].loss) for out in found)
    finite = expected.loss.isfinite()  # a rest without mass makes KL(q||p) infinite
    assert torch.equal(found[0].loss.isfinite(), finite)
    expected_loss, expected_gradient = expected.loss[finite], expected.dlogits[finite]
    assert (found[0].loss[finite] - expected_loss).norm() <= 1e-5 * expected_loss.norm() + floor
    assert (gradient[finite] - expected_gradient).norm() <= 1e-5 * expected_gradient.norm() + floor


@pytest.mark.parametrize("objective, form, backend", combinations(forms=["dense"]))
def test_extreme_logits(objective, form: str, backend: str) -> None:
    """Logits of ±1e4, a common offset, and entries that one side excludes: in other slices than the rest."""
    for change in (_large, _offset, _excluded):
        inputs = inputs_of(objective, C=rows(backend))
        z, z_t = inputs.student.raw, inputs.teacher.raw if isinstance(inputs.teacher, Logits) else None
        change(z, z_t, inputs.labels)
        expected, found = whole(inputs), in_turns(inputs, [20, 20, 21], backend=backend)
        finite = expected.loss.isfinite()
        assert torch.equal(finite, found[0].loss.isfinite())
        assert relative(found[0].loss[finite], expected.loss[finite]) < 1e-5, change.__name__
        gradient = torch.cat([out.dlogits for out in found], 1)
        assert relative(gradient[finite], expected.dlogits[finite]) < 1e-5, change.__name__


def _large(z: Tensor, z_t: Tensor | None, labels: Tensor) -> None:
    z[::2, 5] = 1e4
    z[1::2, 45] = -1e4
    if z_t is not None:
        z_t[::2, 5] = 1e4


def _offset(z: Tensor, z_t: Tensor | None, labels: Tensor) -> None:
    z += 512.0
    if z_t is not None:
        z_t -= 1024.0


def _excluded(z: Tensor, z_t: Tensor | None, labels: Tensor) -> None:
    if z_t is not None:
        z_t[:, 20:40] = -math.inf  # a whole slice
        z[:, 25:30] = -math.inf
    labels[(labels >= 20) & (labels < 40)] = 3
