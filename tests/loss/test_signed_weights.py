"""Token weights of any sign: advantages and importance ratios, so that on-policy losses need no code of their own."""

import math

import pytest
import torch

import fused_kd as fk
from fused_kd.reference import reference_kd_loss

from ..problems import CPU_BACKENDS, gradients, problem, relative


def _advantages(N: int) -> torch.Tensor:
    weights = torch.randn(N, generator=torch.Generator().manual_seed(3))
    weights[4] = 0.0
    return weights


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_signed_weights_against_the_oracle(backend, reduction):
    p = problem(N=13, V=101)
    weights = _advantages(13)
    for objective in (fk.SFT(), fk.ReverseKD(lam=0.5)):
        options = {"token_weights": weights, "signed": True, "reduction": reduction}
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend, **options)
        leaves = [x.detach().double().requires_grad_() for x in (p.hidden, p.weight)]
        teacher = p.hidden_t.double() @ p.weight_t.double().T
        expected = reference_kd_loss(leaves[0] @ leaves[1].T, teacher, p.labels, objective, **options)
        assert relative(out.loss, expected.loss) <= 1e-5  # its terms cancel
        actual = gradients(out.loss.sum(), [p.hidden, p.weight])
        for own, true in zip(actual, torch.autograd.grad(expected.loss.sum(), leaves), strict=True):
            assert relative(own, true) <= 2e-6


def test_a_mean_with_signed_weights_is_over_tokens():
    p = problem(N=12, V=50)
    weights = _advantages(12)
    losses = fk.kd_loss(p.student(), None, p.labels, fk.SFT(), reduction="none").loss
    valid = p.labels != -100
    signed = fk.kd_loss(p.student(), None, p.labels, fk.SFT(), token_weights=weights, signed=True).loss
    torch.testing.assert_close(signed, (weights * losses).sum() / valid.sum())
    shared = fk.kd_loss(p.student(), None, p.labels, fk.SFT(), token_weights=weights, signed=True, num_items=7).loss
    torch.testing.assert_close(shared, (weights * losses).sum() / 7)
    cancelling = torch.where(torch.arange(12) % 2 == 0, 1.0, -1.0)
    assert fk.kd_loss(p.student(), None, p.labels, fk.SFT(), token_weights=cancelling, signed=True).loss.isfinite()


def test_negative_weights_need_to_be_asked_for():
    p = problem(N=6, V=50, ignored=0.0)
    weights = torch.tensor([1.0, 1.0, -0.5, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"token_weights must be finite and at least 0 .*signed.*got -0.5 at token 2"):
        fk.kd_loss(p.student(), None, p.labels, fk.SFT(), token_weights=weights)
    for wrong in (math.nan, math.inf, -math.inf):
        weights[2] = wrong
        with pytest.raises(ValueError, match=r"token_weights must be finite, got -?(nan|inf) at token 2"):
            fk.kd_loss(p.student(), None, p.labels, fk.SFT(), token_weights=weights, signed=True)
    with pytest.raises(TypeError, match="signed must be True or False"):
        fk.KDLoss(fk.SFT(), signed=1)


def test_on_policy_reverse_kl_of_sampled_tokens():
    """Over all of the vocabulary's samples, the policy gradient with ``log q_y - log p_y`` for a cost is KL(q||p)'s."""
    V = 23
    g = torch.Generator().manual_seed(0)
    z, z_t = torch.randn(1, V, generator=g), torch.randn(1, V, generator=g)
    student = z.repeat(V, 1).requires_grad_()
    samples = torch.arange(V)
    told = fk.kd_loss(
        student.detach(), z_t.repeat(V, 1), samples, fk.ReverseKD(lam=1), statistics=("log_q_y", "log_p_y")
    )
    log_q, log_p = told.statistics["log_q_y"], told.statistics["log_p_y"]
    advantage = log_p - log_q
    loss = fk.kd_loss(
        student, None, samples, fk.SFT(), token_weights=log_q.exp() * advantage, signed=True, reduction="sum"
    ).loss
    (sampled,) = torch.autograd.grad(loss, student)
    whole = z.clone().requires_grad_()
    (exact,) = torch.autograd.grad(fk.kd_loss(whole, z_t, samples[:1], fk.ReverseKD(lam=1)).loss, whole)
    assert relative(sampled.sum(0, keepdim=True), exact) <= 1e-5
