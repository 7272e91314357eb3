"""Other libraries' losses over a teacher's top k, from their definitions in plain PyTorch: which tail is whose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.objectives import Objective

from ..kernels.contract import HOSTED, cases, slow
from ..problems import gradients, relative

N, V, K = 9, 53, 6


def sides(T: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's logits, the teacher's largest logits, their ids and its log-softmax there, at temperature T."""
    g = torch.Generator().manual_seed(0)
    z, z_t = (3 * torch.randn(N, V, generator=g) for _ in range(2))
    top, indices = z_t.topk(K)
    return z, top, indices, (z_t / T).log_softmax(-1).gather(-1, indices)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """TRL's and ms-swift's generalized JSD: ``beta`` is the teacher's share of the mixture; ends are KL."""
    if beta == 0.0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1.0:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    forward, reverse = (log_p.exp() * (log_p - log_m)).sum(-1), (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * forward + (1 - beta) * reverse


def over_the_list(z: Tensor, indices: Tensor, T: float) -> Tensor:
    return (z.gather(-1, indices) / T).log_softmax(-1)


def swift(z: Tensor, top: Tensor, indices: Tensor, log_p: Tensor, T: float, beta: float) -> Tensor:
    """GKD with a teacher's top k: both sides' softmax over the k entries."""
    return jsd((top / T).log_softmax(-1), over_the_list(z, indices, T), beta)


def top_k_logits_kl(z: Tensor, top: Tensor, indices: Tensor, log_p: Tensor, T: float) -> Tensor:
    """NVIDIA's TopKLogitsKL, which multiplies by the square of the temperature."""
    target, log_q = (top / T).softmax(-1), over_the_list(z, indices, T)
    return T**2 * torch.nn.functional.kl_div(log_q, target, reduction="none").sum(-1)


def axolotl_liger(z: Tensor, top: Tensor, indices: Tensor, log_p: Tensor, T: float) -> Tensor:
    """Its kernel's default: served log-probabilities, both sides normalised over them; times the square of T."""
    target, log_q = (log_p / T).log_softmax(-1), over_the_list(z, indices, T)
    return T**2 * (target.exp() * (target - log_q)).sum(-1)


def axolotl_forward_kl(z: Tensor, top: Tensor, indices: Tensor, log_p: Tensor, T: float) -> Tensor:
    """The teacher normalised over its list, the student over the vocabulary; times the square of T."""
    target, log_q = (log_p / T).log_softmax(-1), (z / T).log_softmax(-1).gather(-1, indices)
    return T**2 * (target.exp() * (target - log_q)).sum(-1)


def server(z: Tensor, top: Tensor, indices: Tensor, log_p: Tensor, T: float, beta: float, tail: bool) -> Tensor:
    """TRL's loss against a server, whose log-probabilities are of temperature T: with one more entry for what is left
    of each side, or both normalised over the list."""
    log_q = (z / T).log_softmax(-1).gather(-1, indices)
    if not tail:
        return jsd(*(x - x.logsumexp(-1, keepdim=True) for x in (log_p, log_q)), beta)
    with_rest = (torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1) for x in (log_p, log_q))
    return jsd(*with_rest, beta)


Peer = Callable[..., Tensor]
KL = fk.ForwardKD(lam=1.0)
# What of ours it is: the objective, the tail, whether values are logits, and the factor T ** 2.
PEERS: dict[str, tuple[Peer, dict, Objective, str, bool, bool]] = {
    **{
        f"ms-swift {beta}": (swift, {"beta": beta}, fk.GeneralizedJSD(beta=beta), "listed", True, False)
        for beta in (0.0, 0.3, 0.5, 1.0)
    },
    "TopKLogitsKL": (top_k_logits_kl, {}, KL, "listed", True, True),
    "axolotl Liger": (axolotl_liger, {}, KL, "listed", False, True),
    "axolotl forward_kl": (axolotl_forward_kl, {}, KL, "renormalize", False, True),
    **{
        f"TRL server {beta}": (
            server, {"beta": beta, "tail": False}, fk.GeneralizedJSD(beta=beta), "listed", False, False
        )
        for beta in (0.0, 0.5, 1.0)
    },
    **{
        f"TRL server with tail {beta}": (
            server, {"beta": beta, "tail": True}, fk.GeneralizedJSD(beta=beta), "bucket", False, False
        )
        for beta in (0.0, 0.5, 1.0)
    },
}  # fmt: skip


# In the interpreter: each tail, values that are logits or not, both KLs and a mixture; all but one not at 1.
IN_THE_INTERPRETER = {
    "ms-swift 0.3": 2.0, "axolotl Liger": 2.0, "axolotl forward_kl": 2.0, "TRL server 1.0": 1.0,
    "TRL server with tail 0.5": 2.0,
}  # fmt: skip
CASES = cases(list(PEERS), [1.0, 2.0], backends=HOSTED, few=lambda name, T: IN_THE_INTERPRETER.get(name) == T)


@pytest.mark.parametrize("name, T, backend", CASES)
def test_a_peer_is_one_of_our_tails(name, T, backend):
    peer, options, objective, tail, of_logits, squared = PEERS[name]
    taken_at = T if peer is server else 1.0
    z, top, indices, log_p = (x[: 4 if slow(backend) else N] for x in sides(taken_at))
    leaf = z.double().requires_grad_()
    expected = peer(leaf, top.double(), indices, log_p.double(), T, **options)
    teacher = fk.TopK(top if of_logits else log_p, indices, tail, temperature=taken_at)
    own = z.clone().requires_grad_()
    labels = indices[:, 1]  # in the list, where a bucket does not split it off
    out = fk.kd_loss(own, teacher, labels, objective, reduction="none", temperature=T, backend=backend)
    factor = T**2 if squared else 1.0
    assert relative(factor * out.loss, expected) < 4e-6
    assert relative(factor * gradients(out.loss.sum(), [own])[0], gradients(expected.sum(), [leaf])[0]) < 4e-6


def test_they_are_not_each_other():
    """On these inputs one tail cannot pass for another."""
    z, top, indices, log_p = (x.double() if x.is_floating_point() else x for x in sides())
    found = [PEERS[name][0](z, top, indices, log_p, 1.0, **PEERS[name][1]) for name in
             ("TopKLogitsKL", "axolotl forward_kl", "TRL server with tail 0.0")]  # fmt: skip
    assert all(relative(a, b) > 0.05 for i, a in enumerate(found) for b in found[:i])
