"""Numbers that each row has for itself are those that a call of this row alone would be given."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd import objectives as o
from fused_kd.objectives import Objective, Sum

from ..problems import relative
from .contract import ROWS, call, cases, check, loose, make, oracle, slow


def of(objective: Objective, row: int) -> Objective:
    """With the numbers of one row."""

    def own(x):
        return x[row].item() if isinstance(x, Tensor) else x

    if isinstance(objective, Sum):
        return Sum(tuple((own(weight), of(part, row)) for weight, part in objective.parts))
    return replace(objective, **{field.name: own(getattr(objective, field.name)) for field in fields(objective)})


def numbers(seed: int) -> Tensor:
    """Of six rows; both ends among them."""
    g = torch.Generator().manual_seed(seed)
    x = 0.05 + 0.9 * torch.rand(6, generator=g)
    x[1], x[4] = 0.0, 1.0
    return x


A, B, INNER = numbers(1), numbers(2), numbers(3).clamp(0.1, 0.9)
GAMMA = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, float("inf")])
TOKEN = {
    "forward_kd": fk.ForwardKD(lam=A),
    "reverse_kd": fk.ReverseKD(lam=A),
    "no_evo": fk.NoEvo(lam=A),
    "skew": fk.Skew(lam=A, beta=B, floor=INNER),
    "skew_teacher": fk.SkewTeacher(lam=A, beta=B),
    "self_evolution": fk.SelfEvolution(lam=A, beta=B, gamma=GAMMA, floor=INNER),
    "excess": fk.SelfEvolution(lam=INNER, beta=B, gamma=GAMMA, gate="excess"),
    "kl": fk.SelfEvolution(lam=A, beta=INNER, gamma=GAMMA, gate="kl"),
    "generalized_jsd": fk.GeneralizedJSD(beta=INNER),
    "skew_forward": fk.SkewForward(alpha=B),
    "skew_reverse": fk.SkewReverse(alpha=INNER),
    "skew_reverse_detached": o.SkewReverseDetached(alpha=INNER),
    "symmetric_kl": o.SymmetricKL(beta=A),
    "entropy_gated": o.EntropyGated(tau=torch.tensor([0.0, 1.0, 3.0, 3.5, 4.0, 9.0])),
    "alpha_beta": o.AlphaBeta(alpha=INNER, beta=INNER.flip(0)),
    "renyi": o.Renyi(alpha=INNER),
    "sum": A * fk.SFT() + B * fk.GeneralizedJSD(beta=INNER) + 1e-3 * B * o.ZLoss(),
    "sum_gated": A * fk.SelfEvolution(lam=INNER, gamma=GAMMA, floor=0.2) + INNER * o.AcceptanceMix() + fk.NoEvo(lam=B),
}
SLOW = ("self_evolution", "excess", "alpha_beta", "sum_gated", "entropy_gated")
TEMPERATURES = {"1": 1.0, "2": 2.0, "each": torch.tensor([0.5, 1.0, 2.0, 0.7, 4.0, 1.5])}


def chosen() -> list:
    made = []
    for case in cases(list(TEMPERATURES), list(TOKEN)):
        T, name, backend = case.values
        rare = slow(backend) and (name not in SLOW or T != "each")
        made.append(pytest.param(*case.values, id=case.id, marks=[*case.marks, *([pytest.mark.exhaustive] * rare)]))
    return made


@pytest.mark.parametrize("T, name, backend", chosen(), indirect=["backend"])
def test_numbers_of_each_row(T, name, backend):
    objective, T = TOKEN[name], TEMPERATURES[T]
    z, z_t, labels = make(6, 100 if slow(backend) else 600, near=False)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 3.0])
    found = call(backend, z, z_t, labels, objective, T=T, weights=weights)
    expected = oracle(z, z_t, labels, objective, T=T)
    expected.dlogits.mul_(weights[:, None])
    powers = name in ("alpha_beta", "renyi")
    check(
        found, expected, 1e-5 * (1 + 4 * powers) if loose(objective) or powers else 4e-6, 4e-6, 1e-5 if powers else 1e-6
    )
    for row in range(6) if not slow(backend) else (2, 4):
        own = T[row].item() if isinstance(T, Tensor) else T
        one = slice(row, row + 1)
        alone = call(backend, z[one], z_t[one], labels[one], of(objective, row), T=own, weights=weights[one])
        assert torch.equal(found.is_hard[one], alone.is_hard)
        for key in ("loss", "difficulty", "dlogits"):
            a, b = getattr(found, key)[one], getattr(alone, key)
            assert relative(a, b) < 1e-5 * (1 + 4 * powers) or (a - b).abs().max() < 1e-6, (key, row)


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_the_same_number_for_each_row_is_one_for_all(backend):
    z, z_t, labels = make(4, 150)
    plain = fk.SelfEvolution(lam=0.3, beta=0.6, gamma=1.0, floor=0.1)
    spread = replace(plain, **{field: torch.full((4,), getattr(plain, field)) for field in ("lam", "beta", "gamma")})
    for T in (1.0, 2.0):
        one, each = (call(backend, z, z_t, labels, objective, T=T) for objective in (plain, spread))
        assert torch.equal(one.is_hard, each.is_hard)
        for key in ("loss", "difficulty", "dlogits"):
            assert relative(getattr(each, key), getattr(one, key)) < 1e-6, key
