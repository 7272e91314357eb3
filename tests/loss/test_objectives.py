"""Identities between objectives, the oracle against textbook formulas, and the divergence table against autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import fused_kd as fk
from fused_kd.divergences import DIVERGENCES, overlap_h
from fused_kd.reference import reference_rows

from ..problems import OBJECTIVES, furthest, gradients, problem, reads_level, relative


def test_names_map_to_classes():
    assert list(fk.OBJECTIVES) == [
        "sft", "forward_kd", "reverse_kd", "no_evo", "skew", "skew_teacher", "self_evolution", "self_evolution_top_k",
        "generalized_jsd", "skew_forward", "skew_reverse", "total_variation", "adaptive_kl",
        "skew_reverse_detached", "symmetric_kl", "entropy_gated", "todi", "alpha_beta", "renyi", "acceptance",
        "acceptance_mix", "z_loss",
    ]  # fmt: skip
    assert fk.OBJECTIVES["self_evolution"](gamma=1) == fk.SelfEvolution(gamma=1.0)
    with pytest.raises(AttributeError):
        fk.SelfEvolution().gamma = 2.0  # frozen


def test_forward_kd_and_no_evo_differ_by_a_constant():
    p = problem()
    a = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.ForwardKD(lam=0.3))
    b = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(lam=0.3))
    assert not torch.isclose(a.loss, b.loss)
    assert furthest(gradients(a.loss, p.leaves), gradients(b.loss, p.leaves)) < 1e-6


def test_hard_loss_is_bounded_and_jumps_down_at_gamma():
    p = problem(N=64, ignored=0.0)
    options = {"reduction": "none"}
    d = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), **options).loss
    skew = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.Skew(), **options).loss
    assert (skew <= torch.minimum(0.5 * d, torch.tensor(-math.log(0.5))) + 1e-6).all()
    gamma = d.median().item()
    mixed = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution(gamma=gamma), **options)
    assert torch.equal(mixed.is_hard, mixed.difficulty > gamma)
    assert 0 < mixed.is_hard.sum() < 64
    assert relative(mixed.loss, torch.where(mixed.is_hard, skew, d)) < 1e-6


@pytest.mark.parametrize("beta, same", [(1.0, "no_evo"), (0.0, "zero")])
def test_limits_of_beta(beta, same):
    p = problem()
    grads = gradients(fk.kd_loss(p.student(), p.teacher(), p.labels, fk.Skew(beta=beta)).loss, p.leaves)
    ref = gradients(fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo()).loss, p.leaves)
    for g, r in zip(grads, ref, strict=True):
        assert torch.equal(g, r) if same == "no_evo" else g.norm() < 1e-7


def test_logit_gradients_sum_to_zero():
    p = problem().logits()
    for objective in (o for o in OBJECTIVES if not reads_level(o)):
        (dz,) = gradients(fk.kd_loss(p.hidden, p.hidden_t, p.labels, objective, reduction="sum").loss, [p.hidden])
        assert dz.abs().sum() > 1
        assert (dz.sum(-1).abs() < 2e-6).all()


def test_oracle_is_the_textbook():
    """The reference against torch.nn.functional's own divergences, composed by hand."""
    z, z_t, y = torch.randn(7, 31).double() * 2, torch.randn(7, 31).double() * 2, torch.randint(0, 31, (7,))
    p, log_q = z_t.softmax(-1), z.log_softmax(-1)
    target = 0.3 * F.one_hot(y, 31).double() + 0.7 * p
    ce = F.cross_entropy(z, y, reduction="none")

    def kl(target, log_input):
        return F.kl_div(log_input, target, reduction="none").sum(-1)

    def skewed(t, beta):
        return (beta * log_q.exp() + (1 - beta) * t).log()

    d = kl(target, log_q)
    q = log_q.exp()
    log_m = (0.3 * p + 0.7 * q).log()
    expected = {
        fk.SFT(): ce,
        fk.ForwardKD(lam=0.7): 0.3 * ce + 0.7 * kl(p, log_q),
        fk.ReverseKD(lam=0.7): 0.3 * ce + 0.7 * kl(log_q.exp(), p.log()),
        fk.NoEvo(lam=0.7): d,
        fk.Skew(lam=0.7, beta=0.2): kl(target, skewed(target, 0.2)),
        fk.SkewTeacher(lam=0.7, beta=0.9): 0.3 * ce + 0.7 * kl(p, skewed(p, 0.9)),
        fk.SelfEvolution(lam=0.7, beta=0.2, gamma=2.0): torch.where(d > 2.0, kl(target, skewed(target, 0.2)), d),
        fk.SelfEvolutionTopK(lam=0.7, beta=0.2, fraction=0.4): torch.where(
            d >= d.sort().values[-3], kl(target, skewed(target, 0.2)), d
        ),
        fk.GeneralizedJSD(beta=0.3): 0.3 * kl(p, log_m) + 0.7 * kl(q, log_m),
        fk.GeneralizedJSD(beta=0.0): kl(p, log_q),
        fk.GeneralizedJSD(beta=1.0): kl(q, p.log()),
        fk.SkewForward(alpha=0.2): kl(p, (0.8 * q + 0.2 * p).log()),
        fk.SkewReverse(alpha=0.2): kl(q, (0.2 * q + 0.8 * p).log()),
        fk.TotalVariation(): F.l1_loss(p, q, reduction="none").sum(-1) / 2,
    }
    for objective, value in expected.items():
        actual = reference_rows(z, z_t, y, objective)[0]
        assert relative(actual, value) < 1e-13, objective


def test_adaptive_kl_weighs_the_head_by_its_share_of_the_error():
    p = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]]).double()
    q = torch.tensor([[0.3, 0.3, 0.1, 0.2, 0.1]]).double()
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    # The two entries of 0.2 share their fate: out at a mass of 0.6, in at 0.85; the top is always in.
    for mass, share in ((0.1, 0.25), (0.6, 0.25), (0.85, 0.75), (1.0, 1.0)):
        objective = fk.AdaptiveKL(fraction=mass)
        expected = share * forward + (1 - share) * reverse
        for actual in (
            reference_rows(q.log(), p.log(), torch.tensor([0]), objective)[0],
            fk.kd_loss(q.log().float(), p.log().float(), torch.tensor([0]), objective).loss,
        ):
            assert relative(actual.squeeze(), expected) < 1e-6


def test_the_largest_difficulties_are_hard_across_chunks_and_ties_go_by_position():
    p = problem(N=40, ignored=0.3)
    valid = int((p.labels != -100).sum())
    for fraction in (0.0, 0.1, 0.5, 1.0):
        objective = fk.SelfEvolutionTopK(fraction=fraction)
        whole = fk.kd_loss(p.student(), p.teacher(), p.labels, objective)
        small = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, memory_budget=20000)
        assert whole.is_hard.sum() == math.ceil(fraction * valid) and torch.equal(whole.is_hard, small.is_hard)
        if 0 < fraction < 1:
            easy = (p.labels != -100) & ~whole.is_hard
            assert whole.difficulty[whole.is_hard].min() >= whole.difficulty[easy].max()
        assert furthest(*(gradients(out.loss, p.leaves) for out in (whole, small))) < 1e-6
    z, labels = torch.randn(1, 9).expand(10, -1), torch.zeros(10, dtype=torch.long)
    out = fk.kd_loss(z, z.flip(1), labels, fk.SelfEvolutionTopK(fraction=0.3))
    assert out.is_hard.tolist() == [True] * 3 + [False] * 7


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_table_s_g_is_the_gradient_of_its_h(name):
    """dz = g - q * sum(g) against autograd through h, in float64."""
    divergence = DIVERGENCES[name]
    z = torch.randn(5, 23, dtype=torch.float64, requires_grad=True)
    t, beta = torch.randn(5, 23, dtype=torch.float64).mul(2).softmax(-1), 0.3
    alpha = 0.4 if name == "alpha_beta" else 1 - beta

    def arguments(q, constant=lambda x: x):
        """With what the definition has for a constant; powers of which one exponent is free."""
        m = constant(beta * q + alpha * t)
        r, s = t / m, q / m
        if name == "todi":
            r, s = constant(r), constant(s)
        powers = t**alpha * q**beta, t ** (alpha + beta), q ** (alpha + beta)
        return t, q, t.log() - q.log(), r, r.log(), s, s.log(), beta, alpha, *powers

    detached = name in ("skew_reverse_kl_detached", "todi")
    given = arguments(z.softmax(-1), torch.Tensor.detach if detached else lambda x: x)
    if divergence.h is overlap_h:  # PyTorch takes no truth value from 1
        value = torch.minimum(*given[:2])
        assert relative(torch.from_numpy(overlap_h(*(x.detach().numpy() for x in given[:2]), *given[2:])), value) == 0
    else:
        value = divergence.h(*given)
    (ref,) = torch.autograd.grad(value.sum(), z)
    q = z.detach().softmax(-1)
    g = divergence.g(*arguments(q))
    assert relative(g - q * g.sum(-1, keepdim=True), ref) < 1e-13
    if divergence.free:
        assert torch.allclose(g.sum(-1), torch.tensor(-1.0, dtype=torch.float64))
