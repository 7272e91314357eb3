"""Objectives that are others in disguise, limits of their numbers, and bounds between them."""

from __future__ import annotations

import math

import pytest
import torch

import fused_kd as fk
from fused_kd import objectives as o

from ..problems import CPU_BACKENDS, furthest, gradients, problem, relative


def run(p, objective, backend="torch", **options):
    options = {"reduction": "none"} | options
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend, **options)
    return out, gradients(out.loss.sum(), p.leaves)


SAME = {
    "a floor of 1 is NoEvo": (fk.Skew(lam=0.3, beta=0.4, floor=1.0), fk.NoEvo(lam=0.3)),
    "of hard tokens too": (fk.SelfEvolution(lam=0.3, gamma=0.1, floor=1.0), fk.NoEvo(lam=0.3)),
    "ranked too": (fk.SelfEvolutionTopK(lam=0.3, floor=1.0), fk.NoEvo(lam=0.3)),
    "a floor between": (
        fk.Skew(lam=0.3, beta=0.4, floor=0.25),
        0.25 * fk.NoEvo(lam=0.3) + 0.75 * fk.Skew(lam=0.3, beta=0.4),
    ),
    "beta 1 leaves no mixture": (fk.Skew(lam=0.3, beta=1.0, floor=0.3), fk.NoEvo(lam=0.3)),
    "nothing is hard": (fk.SelfEvolution(lam=0.3, gamma=math.inf, floor=0.3), fk.NoEvo(lam=0.3)),
    "all is hard": (
        fk.SelfEvolution(lam=0.3, beta=0.4, gamma=0.0, floor=0.2),
        fk.Skew(lam=0.3, beta=0.4, floor=0.2),
    ),
    "Jeffreys": (2 * o.SymmetricKL(beta=0.5), fk.ForwardKD(lam=1) + fk.ReverseKD(lam=1)),
    "a sum under a name": (o.SymmetricKL(beta=0.3), 0.3 * fk.ForwardKD(lam=1) + 0.7 * fk.ReverseKD(lam=1)),
    "one side of it": (o.SymmetricKL(beta=0.0), fk.ReverseKD(lam=1.0)),
    "alpha-beta (1, 0)": (o.AlphaBeta(alpha=1, beta=0), fk.ForwardKD(lam=1.0)),
    "alpha-beta (0, 1)": (o.AlphaBeta(alpha=0, beta=1), fk.ReverseKD(lam=1.0)),
    "never unsure": (o.EntropyGated(tau=math.inf), fk.ReverseKD(lam=1.0)),
    "always unsure": (o.EntropyGated(tau=0.0), fk.ReverseKD(lam=1.0) + fk.ForwardKD(lam=1.0)),
    "detached alpha 0": (o.SkewReverseDetached(alpha=0.0), fk.ReverseKD(lam=1.0)),
    "KL in parts": (0.4 * fk.NoEvo(lam=1.0) + 0.6 * fk.ForwardKD(lam=1.0), fk.ForwardKD(lam=1.0)),
    "cross-entropy in parts": (0.4 * fk.SFT() + 0.6 * fk.NoEvo(lam=0.0), fk.SFT()),
    "TV in parts": (0.5 * fk.TotalVariation() + 1.5 * fk.TotalVariation(), 2 * fk.TotalVariation()),
}


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("name", SAME)
def test_the_same_loss_and_gradient(name, T):
    if T != 1.0 and name.startswith("cross"):
        return  # the one is taken at temperature 1
    p = problem()
    (a, grads_a), (b, grads_b) = (run(p, objective, temperature=T) for objective in SAME[name])
    assert relative(a.loss, b.loss) < 2e-6 and furthest(grads_a, grads_b) < 5e-6
    assert relative(a.difficulty, b.difficulty) < 2e-6 or name.startswith(("KL", "cross"))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_floor_of_0_is_the_paper_s_to_the_bit(backend):
    p = problem(9)
    for cls in (fk.Skew, fk.SelfEvolution, fk.SelfEvolutionTopK):
        (a, grads_a), (b, grads_b) = (run(p, x, backend) for x in (cls(), cls(floor=0.0)))
        assert torch.equal(a.loss, b.loss) and all(map(torch.equal, grads_a, grads_b))
        assert cls() == cls(floor=0.0) and cls().spec == cls(floor=0.7).spec


def test_a_floor_keeps_the_gradient_of_a_student_that_knows_nothing():
    p = problem(std=8.0, ignored=0.0)
    p.labels.copy_(problem(std=8.0, seed=1, ignored=0.0).labels)
    norms = [run(p, fk.Skew(lam=0.0, floor=floor))[1][0].norm() for floor in (0.0, 0.1)]
    plain = run(p, fk.NoEvo(lam=0.0))[1][0].norm()
    assert norms[0] < 0.05 * plain and norms[1] > 0.09 * plain


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_hellinger_acceptance_and_total_variation(backend):
    p = problem(7, ignored=0.0)
    q, t = (x.double().softmax(-1) for x in (p.hidden @ p.weight.T, p.hidden_t @ p.weight_t.T))
    squared = ((q.sqrt() - t.sqrt()) ** 2).sum(-1) / 2
    assert relative(run(p, o.AlphaBeta(alpha=0.5, beta=0.5), backend)[0].loss, 4 * squared) < 2e-6
    variation = run(p, fk.TotalVariation(), backend)[0].loss
    # At a distance of nearly 1, the rate is what is left of it.
    rate = torch.minimum(q, t).sum(-1)
    assert relative(1 - variation, rate) < 1e-6
    assert relative(run(p, o.Acceptance(), backend)[0].loss, -rate.log()) < 1e-6
    w = (-3 * rate).exp()
    kl = run(p, fk.ForwardKD(lam=1.0), backend)[0].loss
    assert relative(run(p, o.AcceptanceMix(), backend)[0].loss, w * kl + (1 - w) * variation) < 1e-6
    bhattacharyya = -2 * (q * t).sqrt().sum(-1).log()
    assert relative(run(p, o.Renyi(alpha=0.5), backend)[0].loss, bhattacharyya) < 2e-6


def test_limits_and_bounds():
    p = problem()
    kl, reverse = (run(p, objective(lam=1.0)) for objective in (fk.ForwardKD, fk.ReverseKD))
    valid = p.labels != -100
    last = torch.zeros(())
    for alpha in (0.01, 0.3, 0.7, 0.99):
        loss = run(p, o.Renyi(alpha=alpha))[0].loss
        assert (loss[valid] <= kl[0].loss[valid] + 1e-5).all() and loss.sum() > last
        last = loss.sum()
    assert relative(run(p, o.Renyi(alpha=0.999))[0].loss, kl[0].loss) < 1e-2
    assert relative(run(p, o.AlphaBeta(alpha=1.0, beta=1e-3))[0].loss, kl[0].loss) < 1e-2
    assert relative(run(p, o.AlphaBeta(alpha=1e-3, beta=1.0))[0].loss, reverse[0].loss) < 1e-2
    assert furthest(run(p, o.AlphaBeta(alpha=1e-3, beta=1.0))[1], reverse[1]) < 1e-2
    assert furthest(run(p, o.SkewReverseDetached(alpha=1.0))[1], [torch.zeros_like(x) for x in p.leaves]) < 1e-4
    assert relative(run(p, o.SkewReverseDetached(alpha=0.3))[0].loss, run(p, fk.SkewReverse(alpha=0.3))[0].loss) < 1e-6
    assert (run(p, o.ToDi())[0].loss[valid] >= 0).all()


def test_label_smoothing_is_a_teacher_of_zeros():
    """``F.cross_entropy(label_smoothing=eps)`` less the entropy of its target."""
    p, eps = problem(ignored=0.0), 0.1
    leaf = (p.hidden @ p.weight.T).detach().requires_grad_()
    out = fk.kd_loss(leaf, torch.zeros_like(leaf), p.labels, fk.NoEvo(lam=eps), statistics=["target_entropy"])
    other = leaf.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(other, p.labels, label_smoothing=eps)
    assert relative(gradients(out.loss, [leaf])[0], gradients(expected, [other])[0]) < 2e-6
    assert relative(out.loss + out.statistics["target_entropy"].mean(), expected) < 2e-6


def test_class_weights_are_token_weights():
    p = problem()
    weights = torch.rand(517) + 0.1
    own = weights[p.labels.clamp(min=0)]
    leaf = (p.hidden @ p.weight.T).detach().requires_grad_()
    loss = fk.kd_loss(leaf, None, p.labels, fk.SFT(), token_weights=own).loss
    other = leaf.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(other, p.labels, weight=weights.double())
    assert relative(loss, expected) < 1e-6
    assert relative(gradients(loss, [leaf])[0], gradients(expected, [other])[0]) < 2e-6


@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_z_loss_beside_cross_entropy(backend, T):
    """At temperature 1, whatever T is; alone and with a teacher."""
    p = problem(9, ignored=0.0, bias=True)
    copies = [x.detach().double().requires_grad_() for x in p.leaves]
    z = copies[0] @ copies[1].T + copies[2]
    ce, squared = torch.nn.functional.cross_entropy(z, p.labels), z.logsumexp(-1).square().mean()
    for objective, expected in (
        (o.ZLoss(), squared),
        (fk.SFT() + 1e-3 * o.ZLoss(), ce + 1e-3 * squared),
        (fk.SFT() + 1e-3 * o.ZLoss() + 0.0 * fk.ForwardKD(lam=1.0), ce + 1e-3 * squared),
    ):
        out, grads = run(p, objective, backend, temperature=T, reduction="mean")
        assert relative(out.loss, expected) < 1e-6
        assert furthest(grads, torch.autograd.grad(expected, copies, retain_graph=True)) < 3e-6


def test_gates_look_at_what_they_say():
    p = problem(N=64, ignored=0.1)
    valid = p.labels != -100
    wanted = ("kl", "target_entropy", "log_p_y", "entropy_t")
    told = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(lam=0.4), statistics=wanted)
    kl, d = told.statistics["kl"], told.difficulty
    log_p = (p.hidden_t @ p.weight_t.T).double().log_softmax(-1)
    target = 0.4 * log_p.exp()
    target[torch.arange(64), p.labels.clamp(min=0)] += 0.6
    own = (target * (target.log() - log_p)).sum(-1)
    for gate, looked_at in (("difficulty", d), ("excess", (d - own).float()), ("kl", kl)):
        gamma = looked_at[valid].median().item() + 1e-3
        out = run(p, fk.SelfEvolution(lam=0.4, gamma=gamma, gate=gate))[0]
        assert torch.equal(out.is_hard, (looked_at > gamma) & valid) and 0 < out.is_hard.sum() < valid.sum()
        assert relative(out.difficulty, d) < 1e-6
    entropy = told.statistics["entropy_t"]
    tau = entropy[valid].median().item() + 1e-3
    assert torch.equal(run(p, o.EntropyGated(tau=tau))[0].is_hard, (entropy > tau) & valid)
