"""What rows tell of each token beside its loss, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd import objectives as o
from fused_kd.terms import STATISTICS, WITHOUT_SWEEP

from .contract import NATIVE, TORCH, TRITON, call, cases, device_of, make, slow

ROWS = [TORCH, NATIVE, TRITON]  # the CUDA row tells none

TOLD = [
    fk.NoEvo(lam=0.3),
    fk.ForwardKD(lam=0.6),
    fk.SelfEvolution(lam=0.7, gamma=1.0),
    fk.GeneralizedJSD(),
    o.EntropyGated(tau=1.0),
    0.5 * fk.SelfEvolution(lam=0.2, gamma=2.0) + fk.ReverseKD(lam=0.5) + 1e-3 * o.ZLoss(),
]
OF_STUDENT = ("log_sum_exp_s", "entropy_s", "cross_entropy", "log_q_y")


def truth(z: Tensor, z_t: Tensor, labels: Tensor, objective, T: float) -> dict[str, Tensor]:
    y = labels[:, None]
    z, z_t = z.double().cpu(), z_t.double().cpu()
    log_q, log_p = (z / T).log_softmax(1), (z_t / T).log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    spec = objective.spec
    lam = objective.scalars()[spec.main].lam
    target = (lam * p).scatter_add(1, y, torch.full_like(y, 1 - lam, dtype=torch.float64))
    cold = any(term.hard_label or term.z_loss for term in spec.terms)
    return {
        "log_sum_exp_s": (z / T).logsumexp(1),
        "log_sum_exp_t": (z_t / T).logsumexp(1),
        "entropy_s": -torch.xlogy(q, q).sum(1),
        "entropy_t": -torch.xlogy(p, p).sum(1),
        "kl": (torch.xlogy(p, p) - torch.where(p > 0, p * log_q, 0.0)).sum(1),
        "cross_entropy": -(z.log_softmax(1) if cold else log_q).gather(1, y)[:, 0],
        "log_q_y": log_q.gather(1, y)[:, 0],
        "log_p_y": log_p.gather(1, y)[:, 0],
        "target_entropy": -torch.xlogy(target, target).sum(1),
        "top_1": (z.argmax(1) == z_t.argmax(1)).double(),
        "overlap": torch.minimum(p, q).sum(1),
    }


def check(told: Tensor, expected: dict[str, Tensor], tight: float = 2e-6) -> None:
    for name, value in expected.items():
        if STATISTICS.index(name) < told.shape[1]:
            found = told[:, STATISTICS.index(name)].cpu().double()
            assert ((found - value).abs() <= tight * (1 + value.abs())).all(), (name, found, value)


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("columns", [WITHOUT_SWEEP, len(STATISTICS)])
@pytest.mark.parametrize("objective", TOLD, ids=str)
@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_each_statistic(objective, columns, T, backend):
    if slow(backend) and (T == 1.0) != (columns == WITHOUT_SWEEP):
        return  # each value once
    z, z_t, labels = make(5, 150 if slow(backend) else 1300, near=False)
    z_t[2] = z[2] * 1.1
    told = call(backend, z, z_t, labels, objective, T=T, statistics=columns).statistics
    assert told.shape == (5, columns)
    check(told, truth(z, z_t, labels, objective, T))


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_told_beside_the_same_loss_and_gradient(backend):
    z, z_t, labels = make(4, 150, near=False)
    labels[1] = -100
    for objective in (TOLD[2], TOLD[-1]):
        plain = call(backend, z, z_t, labels, objective)
        for columns in (WITHOUT_SWEEP, len(STATISTICS)):
            for gradient in (True, False):
                out = call(backend, z, z_t, labels, objective, statistics=columns, gradient=gradient)
                assert torch.allclose(out.loss, plain.loss, rtol=1e-6) and torch.equal(out.is_hard, plain.is_hard)
                assert not gradient or torch.allclose(out.dlogits, plain.dlogits, rtol=1e-5, atol=1e-8)
                assert not out.statistics[1].any()
                assert out.statistics[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("objective", [fk.SFT(), fk.SFT() + 1e-3 * o.ZLoss()], ids=["sft", "z"])
@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_without_a_teacher(objective, backend):
    z, z_t, labels = make(4, 150)
    told = call(backend, z, None, labels, objective, statistics=WITHOUT_SWEEP).statistics
    expected = truth(z, z_t, labels, objective, 1.0)
    check(told, {name: expected[name] for name in OF_STUDENT})
    others = [i for i, name in enumerate(STATISTICS[:WITHOUT_SWEEP]) if name not in OF_STUDENT]
    assert told[:, others].isnan().all()


@pytest.mark.parametrize(
    "case, backend", cases(["excluded", "huge", "one word", "scaled"], backends=ROWS), indirect=["backend"]
)
def test_at_the_edge(case, backend):
    z, z_t, labels = make(4, 1 if case == "one word" else 150, near=False)
    options = {}
    if case == "excluded":
        labels = labels % 100
        z[:, 120:] = z_t[:, 120:] = -math.inf
        z_t[1, :50] = -math.inf
        labels[1] = 60
    elif case == "huge":
        z, z_t = z * 2000, z_t * 2000
    elif case == "scaled":
        options = {"scale": (0.5, 2.0), "cap": (5.0, None)}
    told = call(backend, z, z_t, labels, fk.NoEvo(lam=0.4), statistics=len(STATISTICS), **options).statistics
    a, b = z.double(), z_t.double()
    if case == "scaled":
        a, b = 5 * torch.tanh(0.5 * a / 5), 2 * b
    expected = truth(a, b, labels, fk.NoEvo(lam=0.4), 1.0)
    assert not told.isnan().any()
    if case == "huge":
        for name in ("log_sum_exp_s", "log_sum_exp_t", "entropy_s", "entropy_t", "kl", "overlap", "top_1"):
            found = told[:, STATISTICS.index(name)].cpu().double()
            assert ((found - expected[name]).abs() <= 1e-5 * (1 + expected[name].abs())).all(), name
        return
    check(told, expected, 1e-5)


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_largest_logits_that_several_tokens_have(backend):
    """In one block and in two; one of them is enough to agree."""
    V = 100 if slow(backend) else 2100
    z, z_t = torch.zeros(4, V), torch.zeros(4, V)
    z[:, 1] = z[:, V - 1] = 3.0
    z_t[0, V - 1] = z_t[1, 1] = z_t[2, 2] = z_t[3, 2] = z_t[3, 1] = 4.0
    told = call(backend, z, z_t, torch.zeros(4, dtype=torch.int64), fk.NoEvo(), statistics=len(STATISTICS)).statistics
    assert told[:, STATISTICS.index("top_1")].tolist() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_an_offset_costs_no_digits_but_its_own(backend):
    z, z_t, labels = make(3, 150)
    z, z_t = ((x * 256).round() / 256 for x in (z, z_t))
    told = [
        call(backend, z + by, z_t - by, labels, fk.NoEvo(), statistics=WITHOUT_SWEEP).statistics for by in (0, 4096)
    ]
    same = [i for i, name in enumerate(STATISTICS[:WITHOUT_SWEEP]) if not name.startswith("log_sum_exp")]
    assert torch.allclose(told[0][:, same], told[1][:, same], rtol=1e-5, atol=2e-6)
    assert torch.allclose(told[0][:, 0] + 4096, told[1][:, 0]) and told[0].device.type == device_of(backend)
