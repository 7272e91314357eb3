"""Every objective, row, input form and dtype against the float64 oracle, no worse than rounding makes it."""

from __future__ import annotations

import itertools

import pytest
import torch

import fused_kd as fk

from ..budget import LIMIT, ROUNDING, UNIT, _rounded, check_budget, mean_loss_budget, rounding_cost
from ..problems import (
    NAMES,
    OBJECTIVES,
    Problem,
    amplified,
    furthest,
    gradients,
    has_powers,
    oracle64,
    problem,
    relative,
    summands,
)
from .contract import DTYPES, FP32, GPU, INTERPRETED, NATIVE, NEAR, ROUNDED, ROWS, TORCH, cases, device_of, slow

# The row in PyTorch runs on GPUs too.
BACKENDS = [*ROWS, *([pytest.param("torch", id="torch-cuda", marks=pytest.mark.gpu)] if GPU else [])]
# Keeps fp16 gradients out of the subnormals, as a GradScaler does.
LOSS_SCALE = 1024.0


def run(p: Problem, objective, backend: str, **options) -> tuple[fk.KDOutput, list[torch.Tensor]]:
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend, **options)
    return out, gradients(out.loss, p.leaves)


def rows(objective, backend: str) -> int:
    """Few where they are emulated or interpreted, above all where they are sorted."""
    return 29 if not slow(backend) else 5 if "adaptive_kl" in summands(objective) else 7


@pytest.fixture
def device(request: pytest.FixtureRequest, backend: str) -> str:
    return "cuda" if "torch-cuda" in request.node.name else device_of(backend)


HIDDEN = cases([1.0, 4.0], NEAR, OBJECTIVES, backends=BACKENDS)


@pytest.mark.parametrize("std, near, objective, backend", HIDDEN, indirect=["backend"])
def test_hidden_fp32(std, near, objective, backend, device):
    p = problem(rows(objective, backend), std=std, near=near, device=device)
    check_budget(p, objective, *run(p, objective, backend))


LOW = cases(DTYPES[1:], NEAR, OBJECTIVES, backends=BACKENDS)


@pytest.mark.parametrize("dtype, near, objective, backend", LOW, indirect=["backend"])
def test_hidden_low_precision(dtype, near, objective, backend, device):
    p = problem(rows(objective, backend), std=3.0, near=near, dtype=dtype, device=device)
    check_budget(p, objective, *run(p, objective, backend))


# Every objective, wherever rows run.
EACH = cases(OBJECTIVES, backends=BACKENDS, kinds=NAMES)


@pytest.mark.parametrize("objective, backend", EACH, indirect=["backend"])
def test_bias_and_chunks_with_short_last(objective, backend, device):
    p = problem(N=9 if slow(backend) else 23, bias=True, device=device)
    per_token = 4 * 517 * 2 + 8 * (24 + 40) + 16
    check_budget(p, objective, *run(p, objective, backend, memory_budget=5 * per_token))


def loss_budget(objective, z, z_t, losses) -> float:
    """Both directions of KL round beside each other."""
    return mean_loss_budget(z, z_t, losses) * max(amplified(objective), 2.0 * ("entropy_gated" in summands(objective)))


LOGITS = cases(DTYPES, NEAR, OBJECTIVES, backends=BACKENDS)


@pytest.mark.parametrize("dtype, near, objective, backend", LOGITS, indirect=["backend"])
def test_logits(dtype, near, objective, backend, device):
    V = 520 if backend == "cuda" else 517  # aligned: eight elements a slot
    p = problem(rows(objective, backend), std=3.0, near=near, device=device, V=V)
    z = (p.hidden @ p.weight.T).detach().to(dtype).requires_grad_()
    z_t = (p.hidden_t @ p.weight_t.T).to(dtype)
    out = fk.kd_loss(z, z_t, p.labels, objective, backend=backend)
    (actual,) = gradients(out.loss * LOSS_SCALE, [z])
    z64 = z.detach().double().requires_grad_()
    expected = fk.reference.reference_kd_loss(z64, z_t.double(), p.labels, objective, reduction="none")
    valid = p.labels != -100
    losses = expected.loss[valid]
    (ref,) = gradients(losses.mean() * LOSS_SCALE, [z64])
    assert relative(out.loss, losses.mean()) < loss_budget(objective, z64[valid], z_t.double()[valid], losses)
    truncates = 2 if INTERPRETED and backend == "triton" else 1  # the interpreter truncates where a GPU rounds
    exact = 3e-5 if has_powers(objective) else 1e-5 if "entropy_gated" in summands(objective) else 4e-6
    assert relative(actual, ref) < (exact if dtype == FP32 else ROUNDED[dtype] + exact) * truncates
    assert actual[p.labels == -100].abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_low_precision_bias_that_excludes_tokens(backend, device):
    p = problem(dtype=torch.float16, bias=True, device=device)
    with torch.no_grad():
        p.bias[400:] = -float("inf")
    p.labels.clamp_(max=399)
    out, grads = run(p, fk.ReverseKD(), backend)
    expected, refs = oracle64(p, fk.ReverseKD())
    assert relative(out.loss, expected.loss) < 1e-5
    assert furthest(grads[:2], refs[:2]) < ROUNDING[torch.float16]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_student_and_teacher_in_different_dtypes_and_forms(backend, device):
    p = problem(dtype=torch.float32, dtype_t=torch.bfloat16, device=device)
    objective = fk.SelfEvolution()
    expected, refs = oracle64(p, objective)
    out, grads = run(p, objective, backend)
    assert relative(out.loss, expected.loss) < 1e-6
    assert furthest(grads, refs) < 3e-6
    z_t = p.hidden_t.float() @ p.weight_t.float().T
    mixed = fk.kd_loss(p.student(), z_t, p.labels, objective, backend=backend)
    assert relative(mixed.loss, expected.loss) < 1e-6
    z = (p.hidden @ p.weight.T).detach().requires_grad_()
    other = fk.kd_loss(z, p.teacher(), p.labels, objective, backend=backend)
    assert relative(other.loss, expected.loss) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_torch_row_as_it_runs_where_looking_at_values_would_synchronise(objective, temperature, monkeypatch):
    for module in ("torch.row", "torch.math"):
        monkeypatch.setattr(f"fused_kd.rows.{module}.on_host", lambda x: False)
    p = problem(bias=True)
    out, grads = run(p, objective, "torch", temperature=temperature)
    expected, refs = oracle64(p, objective, temperature=temperature)
    assert relative(out.loss, expected.loss) < 1e-6
    assert torch.equal(out.is_hard, expected.is_hard)
    for g, r in zip(grads, refs, strict=True):
        assert relative(g, r) < 2e-6


@pytest.mark.parametrize("near, backend", cases(NEAR, backends=[TORCH, NATIVE]), indirect=["backend"])
def test_a_real_vocabulary(near, backend):
    """Long rows are where naive sums lose digits: at V = 128256 torch.softmax's norm is off by 1e-5 on a CPU."""
    p, objective = problem(8, 24, 24, 128256, std=4.0, near=near, ignored=0.0), fk.SelfEvolution()
    check_budget(p, objective, *run(p, objective, backend))


@pytest.mark.parametrize("mutation", [0.0, -1.0, 1.02], ids=["zeroed", "negated", "scaled"])
@pytest.mark.parametrize("leaf", [0, 1], ids=["dH", "dW"])
def test_the_budget_catches_wrong_gradients(mutation, leaf):
    """A suite that passes with a wrong gradient proves nothing, so the check itself is checked."""
    for objective, dtype in zip(OBJECTIVES, itertools.cycle((torch.float32, torch.bfloat16)), strict=False):
        p = problem(std=3.0, dtype=dtype)
        out, grads = run(p, objective, "torch")
        grads[leaf] = grads[leaf] * mutation
        with pytest.raises(AssertionError, match=("dH", "dW")[leaf]):
            check_budget(p, objective, out, grads)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_the_budget_catches_sixteen_times_the_rounding(objective):
    """As of logits in TF32, or of a long sum in fp32 one term after the other."""
    p = problem(std=4.0, near=True)
    exact = _rounded(p, objective, 0.0, torch.Generator())
    coarse = _rounded(p, objective, 16 * UNIT, torch.Generator().manual_seed(99))
    cost = rounding_cost(p, objective)
    for name in ("dH", "dW"):
        assert relative(coarse[name], exact[name]) > max(ROUNDING[torch.float32], LIMIT * cost[name])


def test_a_nan_is_no_small_error():
    one, none = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert not furthest([one, none, one], [one, one, one]) < 1.0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_numbers_are_filled_in_where_they_are_wanted(objective, monkeypatch):
    """A copy of a number to a GPU would wait for it; see tests/test_gpu.py for what does."""
    as_tensor = torch.as_tensor

    def watched(x, *args, **options):
        assert isinstance(x, torch.Tensor) or options.get("device") is None
        return as_tensor(x, *args, **options)

    monkeypatch.setattr(torch, "as_tensor", watched)
    run(problem(5), objective, "torch")
