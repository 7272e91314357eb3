"""KDLoss's options: reductions, weights, masks, shifting, heads, upstream gradients, and what is not computed.

tests/kernels/test_training.py has second backwards, accumulation and tied weights; test_extremes.py there has layouts
and hardly any tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fused_kd as fk
from fused_kd import ops
from fused_kd.engines import chunks, dispatch, gemm, head_gradient
from fused_kd.engines.plan import rounded_rows
from fused_kd.objectives import OBJECTIVES as CLASSES
from fused_kd.reference import reference_kd_loss
from fused_kd.rows.native import row as native_row
from fused_kd.rows.torch import math as torch_math

from ..kernels.contract import KINDS, NATIVE, TORCH, TRITON, cases
from ..problems import (
    CPU_BACKENDS,
    OBJECTIVES,
    compare,
    furthest,
    gradients,
    label,
    problem,
    relative,
    rows_for,
    with_numbers,
)

TIGHT = 4e-6
# Their gradients jump where p = q, or where an entry enters the head: rounding may take another side.
DISCONTINUOUS = ("total_variation", "adaptive_kl")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_reductions_with_any_upstream_gradient(reduction, weighted, backend):
    objective = fk.SelfEvolution(gamma=1.0)
    N = rows_for(objective, backend)
    options = {"reduction": reduction, "token_weights": torch.rand(N) if weighted else None}
    upstream = torch.randn(N) if reduction == "none" else torch.tensor(-3.7)
    where = {"backend": backend}
    compare(problem(N, bias=True), objective, tight=TIGHT, where=where, upstream=upstream, **options)


def test_per_token_loss_with_a_frozen_head_and_token_weights():
    """Hidden states have their gradient from the forward pass, and again from a second backward."""
    p = problem()
    upstream, student = torch.randn(29), fk.LMHead(p.hidden, p.weight.detach())
    given = {"reduction": "none", "token_weights": torch.rand(29)}
    out = fk.kd_loss(student, p.teacher(), p.labels, fk.Skew(), **given)
    expected = reference_kd_loss(student, p.teacher(), p.labels, fk.Skew(), **given)
    (ref,) = torch.autograd.grad(expected.loss, [p.hidden], upstream.double())
    for keep in (True, False):
        (found,) = torch.autograd.grad(out.loss, [p.hidden], upstream, retain_graph=keep)
        assert relative(found, ref) < TIGHT


# A ranked objective is one of a row's kinds here: the engine says which of its tokens are hard.
TEMPERATURES = cases(
    [0.5, 2.0], OBJECTIVES, backends=[TORCH, NATIVE, TRITON], kinds=(*KINDS, "forward_kd", "self_evolution_top_k")
)


@pytest.mark.parametrize("temperature, objective, backend", TEMPERATURES)
def test_temperature(temperature, objective, backend):
    p = problem(rows_for(objective, backend))
    compare(p, objective, tight=TIGHT, where={"backend": backend}, temperature=temperature)


HEADS = [{"logit_scale": 0.25}, {"softcap": 3.0}, {"logit_scale": 2.0, "softcap": 5.0}]
SHAPED = cases(HEADS, [fk.SFT(), fk.ForwardKD(), fk.SelfEvolution()], backends=[TORCH, NATIVE, TRITON])


@pytest.mark.parametrize("head, objective, backend", SHAPED)
def test_scale_and_softcap(head, objective, backend):
    compare(problem(13, bias=True), objective, tight=TIGHT, where={"backend": backend}, head=head, temperature=1.5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("form", ["heads", "logits"])
def test_vocab_size_cuts_padded_heads(form, backend):
    p = problem(13, V=131, bias=True)
    p.labels[p.labels >= 100] = 7
    wide = torch.cat([p.weight_t, torch.randn(9, p.weight_t.shape[1])])
    student, teacher = p.student(), fk.LMHead(p.hidden_t, wide)
    expected = reference_kd_loss(student, teacher, p.labels, fk.SelfEvolution(), vocab_size=100)
    refs, leaves = gradients(expected.loss, p.leaves), p.leaves
    if form == "logits":
        student, teacher = (p.hidden @ p.weight.T + p.bias).detach().requires_grad_(), p.hidden_t @ wide.T
        leaves = [student]
    out = fk.kd_loss(student, teacher, p.labels, fk.SelfEvolution(), vocab_size=100, backend=backend)
    found = gradients(out.loss, leaves)
    if form == "logits":
        assert found[0][:, 100:].abs().sum() == 0
        found, refs = [found[0].T @ p.hidden], refs[1:2]
    assert furthest(found, refs) < TIGHT and relative(out.loss, expected.loss) < TIGHT


def test_shift_aligns_next_token_labels():
    p = problem(N=24)
    h, h_t, y = p.hidden.reshape(4, 6, -1), p.hidden_t.reshape(4, 6, -1), p.labels.reshape(4, 6)
    shifted = fk.kd_loss(fk.LMHead(h, p.weight), fk.LMHead(h_t, p.weight_t), y, fk.NoEvo(), shift=True)
    aligned = fk.kd_loss(fk.LMHead(h[:, :-1], p.weight), fk.LMHead(h_t[:, :-1], p.weight_t), y[:, 1:], fk.NoEvo())
    assert relative(shifted.loss, aligned.loss) < 1e-6
    assert shifted.difficulty.shape == y.shape
    assert torch.equal(shifted.difficulty[:, :-1], aligned.difficulty)
    assert shifted.difficulty[:, -1].abs().sum() == 0


def test_annealing_between_forward_and_backward_keeps_the_forward_s_objective():
    p = problem()
    criterion = fk.KDLoss(fk.SelfEvolution(beta=0.5), reduction="none")
    ref = gradients(criterion(p.student(), p.teacher(), p.labels).sum(), p.leaves)
    loss = criterion(p.student(), p.teacher(), p.labels)
    criterion.objective = fk.SelfEvolution(beta=0.9)
    assert all(map(torch.equal, gradients(loss.sum(), p.leaves), ref))
    expected = [0.5, 0.9, 0.4, 1.0, 1.0, 0.5, 0.1, math.log(0.5), 1.0, 0.0, 1.0]
    assert criterion.scalars.flatten().tolist() == pytest.approx(expected)


@pytest.fixture
def gemms(monkeypatch):
    """Counts the multiply-adds of the GEMMs that the engine runs."""
    count = CountGemms()

    def run(*args, **kwargs):
        with count:  # below the opaque op, where a mode around it does not reach
            return dispatch.run(*args, **kwargs)

    monkeypatch.setattr(ops, "run", run)
    return count


class CountGemms(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name != "mm" else args[:2]
            self.flops += a.shape[0] * a.shape[1] * b.shape[1]
        elif name == "_linear_pointwise":
            self.flops += args[0].shape[0] * args[1].numel()
        return func(*args, **(kwargs or {}))


def problem_flops(p, parts: str) -> int:
    n, (V, H), H_t = int((p.labels != -100).sum()), p.weight.shape, p.hidden_t.shape[1]
    rows = rounded_rows(n) if gemm._HAS_ONEDNN else n
    each = {"zs": n * V * H, "zt": n * V * H_t, "dh": rows * V * H, "dw": n * V * H}
    return sum(each[part] for part in parts.split())


@pytest.mark.parametrize(
    "frozen, reduction, parts",
    [
        pytest.param((), "mean", "zs zt dh dw", id="all"),
        pytest.param(("weight",), "mean", "zs zt dh", id="head frozen"),
        pytest.param(("weight",), "none", "zs zt dh", id="head frozen, no second pass"),
        pytest.param(("hidden",), "mean", "zs zt dw", id="hidden frozen"),
        pytest.param(("weight", "hidden"), "mean", "zs zt", id="evaluation"),
        pytest.param((), "no_grad", "zs zt", id="no_grad"),
    ],
)
def test_gemms_run_for_valid_tokens_and_wanted_gradients_only(frozen, reduction, parts, gemms):
    p = problem(N=40, ignored=0.5)
    for name in frozen:
        getattr(p, name).requires_grad_(False)
    with torch.set_grad_enabled(reduction != "no_grad"):
        criterion = fk.KDLoss(fk.SelfEvolution(), reduction=reduction if reduction != "no_grad" else "mean")
        loss = criterion(p.student(), p.teacher(), p.labels)
    if loss.requires_grad:
        loss.backward(torch.randn_like(loss))
    assert loss.requires_grad == ("d" in parts) and gemms.flops == problem_flops(p, parts)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_uninitialised_memory_is_never_read(backend, monkeypatch):
    """Every workspace buffer starts as NaN; so does torch.empty under deterministic algorithms."""

    def poisoned(shape, dtype, device, **_):
        x = torch.empty(shape, dtype=dtype, device=device)
        return x.fill_(float("nan") if dtype.is_floating_point else True)

    for module in (chunks, head_gradient, torch_math, native_row):
        monkeypatch.setattr(module, "empty", poisoned)
    for objective in OBJECTIVES:
        if backend == "triton" and label(objective) not in KINDS:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            p = problem(7 if backend == "triton" else 23, dtype=dtype, bias=True)
            out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=2.0, backend=backend)
            assert torch.isfinite(out.loss)
            assert all(torch.isfinite(g).all() for g in gradients(out.loss, p.leaves))


def test_memory_budget_bounds_the_chunk_and_changes_nothing_else():
    p = problem(N=64, V=300, ignored=0.0)
    whole = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution())
    per_token = 4 * 300 * 2 + 8 * (24 + 40) + 16
    small = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution(), memory_budget=3 * per_token)
    assert relative(small.loss, whole.loss) < 1e-6
    assert furthest(gradients(small.loss, p.leaves), gradients(whole.loss, p.leaves)) < TIGHT
    with pytest.raises(ValueError, match=f"memory_budget must be at least {per_token} bytes"):
        fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution(), memory_budget=per_token - 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    N=st.integers(1, 17), H=st.integers(1, 9), V=st.integers(1, 70), std=st.floats(0.5, 6.0),
    lam=st.floats(0, 1), beta=st.floats(0, 1), gamma=st.floats(0, 3), temperature=st.floats(0.3, 4),
    which=st.sampled_from(list(CLASSES)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_scalar(N, H, V, std, lam, beta, gamma, temperature, which, seed):
    objective = with_numbers(CLASSES[which], lam=lam, beta=beta, gamma=gamma)
    p = problem(N, H, H, V, std=std, seed=seed)
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=temperature)
    expected = reference_kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=temperature)
    if not torch.equal(out.is_hard, expected.is_hard):  # a gate may fall either way
        wrong = expected.difficulty[out.is_hard != expected.is_hard]
        assert which == "entropy_gated" or (
            (wrong - (gamma if which == "self_evolution" else wrong[0])).abs().max() < 1e-5
        )
        return
    if which in DISCONTINUOUS:
        return
    # Relative where there is something to be relative to: a near-constant target leaves only rounding.
    assert abs(out.loss - expected.loss) <= 2e-6 * (1 + abs(expected.loss))
    for a, r, x in zip(gradients(out.loss, p.leaves), gradients(expected.loss, p.leaves), p.leaves, strict=True):
        other = p.weight if x is p.hidden else p.hidden
        assert (a - r).norm() <= 2e-5 * r.norm() + 2e-6 * other.norm()
