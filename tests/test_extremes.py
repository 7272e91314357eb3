"""Logits and scalars at the edge: finite, right results where the mathematics has one."""

from __future__ import annotations

import math

import pytest
import torch

import fused_kd as fk
from fused_kd.reference import reference_kd_loss

from .problems import CPU_BACKENDS, NAMES, OBJECTIVES, gradients, problem, relative

pytestmark = pytest.mark.parametrize("backend", CPU_BACKENDS)


def logits_case(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, z_t = torch.randn(6, 67) * 3, torch.randn(6, 67) * 3
    y = torch.randint(0, 60, (6,))
    if name == "huge":
        z, z_t = z * 3000, z_t * 3000
    elif name == "tail masked in both":
        z[:, 60:], z_t[:, 60:] = -math.inf, -math.inf
    elif name == "teacher masked":
        z_t[:, 60:] = -math.inf
    elif name == "equal":
        z_t = z.clone()
    elif name == "one-hot":
        z[:, 1], z_t[:, 2] = 200.0, 200.0
    elif name == "constant offset":
        z = z + 1e4
    return z, z_t, y


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Relative in norm; equal rows leave nothing but rounding."""
    return relative(actual, expected) < 1e-5 or bool((actual - expected).abs().max() < 2e-7)


CASES = ["huge", "tail masked in both", "teacher masked", "equal", "one-hot", "constant offset"]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
@pytest.mark.parametrize("case", CASES)
def test_logits(case, objective, backend):
    z, z_t, y = logits_case(case)
    z.requires_grad_()
    out = fk.kd_loss(z, z_t, y, objective, backend=backend, reduction="none")
    (dz,) = gradients(out.loss.sum(), [z])
    z64 = z.detach().double().requires_grad_()
    expected = reference_kd_loss(z64, z_t, y, objective, reduction="none")
    (ref,) = gradients(expected.loss.sum(), [z64])
    infinite = expected.loss > 1e18  # positive probability where the other side has none
    assert (out.loss[infinite] == math.inf).all()
    assert torch.isfinite(out.loss[~infinite]).all()
    assert close(out.loss[~infinite], expected.loss[~infinite])
    if infinite.any():
        assert objective.name in ("reverse_kd", "adaptive_kl") and case == "teacher masked"
        return
    scale = 30 if case == "constant offset" else 1  # the offset itself costs digits of the logits
    assert relative(dz, ref) < 1e-5 * scale or (dz - ref).abs().max() < 1e-6 * scale


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [0.0, math.inf])
def test_scalars_at_their_limits(lam, beta, gamma, backend):
    values = {"lam": lam, "beta": beta, "gamma": gamma, "alpha": beta, "fraction": lam}
    p = problem(N=9, V=61)
    for cls in fk.OBJECTIVES.values():
        own = vars(cls())
        reads_lam, reads_beta = "lam" in own or "fraction" in own, "beta" in own or "alpha" in own
        if (lam == 1.0 and not reads_lam) or (beta == 1.0 and not reads_beta) or (gamma > 0 and "gamma" not in own):
            continue  # the same objective as with the other value
        objective = cls(**{name: values[name] for name in own})
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend)
        expected = reference_kd_loss(p.student(), p.teacher(), p.labels, objective)
        assert abs(out.loss - expected.loss) < 2e-6 * (1 + abs(expected.loss)), objective
        for a, r in zip(gradients(out.loss, p.leaves), gradients(expected.loss, p.leaves), strict=True):
            assert (a - r).norm() < 3e-6 * r.norm() + 1e-7, objective
        assert torch.equal(out.is_hard, expected.is_hard)


def test_a_target_on_a_token_the_student_excludes_costs_infinity_unless_skewed(backend):
    z, z_t = torch.zeros(1, 5), torch.zeros(1, 5)
    z[0, 3] = -math.inf
    y = torch.tensor([1])
    losses = {o.name: fk.kd_loss(z, z_t, y, o, backend=backend).loss.item() for o in OBJECTIVES}
    assert all(losses[name] == math.inf for name in INFINITE)
    assert all(math.isfinite(loss) for name, loss in losses.items() if name not in INFINITE)


INFINITE = ("forward_kd", "no_evo", "adaptive_kl")


def test_one_word_vocabulary(backend):
    z = torch.randn(3, 1, requires_grad=True)
    for objective in OBJECTIVES:
        out = fk.kd_loss(z, torch.randn(3, 1), torch.zeros(3, dtype=torch.long), objective, backend=backend)
        assert abs(out.loss.item()) < 1e-20
        assert gradients(out.loss, [z])[0].abs().sum() == 0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_no_nan_from_low_precision_underflow(objective, backend):
    p = problem(std=4.0, dtype=torch.float16)
    p.hidden.data.mul_(8)
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend)
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in gradients(out.loss * 1024, p.leaves))


@pytest.mark.parametrize("objective", [fk.NoEvo(), fk.ReverseKD(), fk.SkewForward()], ids=lambda o: o.name)
def test_a_temperature_near_zero(objective, backend):
    p = problem(N=5, V=67)
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=1e-6, backend=backend)
    expected = reference_kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=1e-6)
    assert relative(out.loss, expected.loss) < 1e-5
    assert all(g.isfinite().all() for g in gradients(out.loss, p.leaves))
