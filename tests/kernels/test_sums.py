"""A sum of objectives is one loss: that of its terms added up, in one call of the row."""

from __future__ import annotations

import math

import pytest
import torch

import fused_kd as fk
from fused_kd import objectives as o
from fused_kd.engines import dispatch
from fused_kd.inputs import TAILS
from fused_kd.objectives import Sum
from fused_kd.reference import reference_kd_loss

from ..problems import JUMPS, OBJECTIVES, gradients, problem, relative, summands
from .contract import KINDS, ROWS, call, cases, check, device_of, make, oracle, slow
from .test_lists import cached
from .ways import refused

SUMS = [objective for objective in OBJECTIVES if isinstance(objective, Sum) and not objective.spec.ranked]
MORE = [
    fk.NoEvo(lam=0.2) + fk.NoEvo(lam=0.8) + fk.ForwardKD(lam=0.4),
    0.5 * fk.SFT() + 1e-2 * o.ZLoss(),
    2.0 * o.Renyi(alpha=0.3) + o.Acceptance() + 0.5 * o.AlphaBeta(),
    fk.TotalVariation() + fk.AdaptiveKL() + o.EntropyGated(tau=4.0),
    fk.Skew(floor=0.4) + 0.3 * fk.SelfEvolution(lam=0.9, gamma=1.0, gate="kl") + fk.SkewTeacher(beta=1.0),
]


def size(backend: str) -> tuple[int, int]:
    return (3, 137) if slow(backend) else (7, 1100)


@pytest.mark.parametrize("T, objective, backend", cases([1.0, 2.0], SUMS), indirect=["backend"])
def test_a_sum_is_that_of_its_terms(T, objective, backend):
    data = make(*size(backend))
    whole = call(backend, *data, objective, T=T)
    parts = [(weight, call(backend, *data, part, T=T)) for weight, part in objective.parts]
    for name in ("loss", "dlogits"):
        added = sum(weight * getattr(found, name).double() for weight, found in parts)
        assert relative(getattr(whole, name), added) < 4e-6, name
    check(whole, oracle(*data, objective, T=T), 1e-5, loss=4e-6)


FAST = [row for row in ROWS if not slow(row.values[0])]


@pytest.mark.parametrize("T", [1.0, 0.7])
@pytest.mark.parametrize("objective", MORE, ids=str)
@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_any_terms_beside_each_other(objective, T, backend):
    data = make(*size(backend), near=False)
    check(call(backend, *data, objective, T=T), oracle(*data, objective, T=T), 2e-5, loss=4e-6)


@pytest.mark.parametrize("tail, objective, backend", cases(TAILS, SUMS, kinds=KINDS), indirect=["backend"])
def test_a_sum_of_lists_is_that_of_its_terms(tail, objective, backend):
    labelled = {part.spec.reads_label for _, part in objective.parts if part.spec.needs_teacher}
    mixed = {part.spec.mixes_label for _, part in objective.parts if part.spec.needs_teacher}
    if refused(objective.spec, tail) or (tail == "bucket" and labelled != {objective.spec.reads_label}):
        return  # where one term reads the label, it stands beside the bucket for all of them
    if tail == "listed" and mixed != {objective.spec.mixes_label}:
        return  # as it joins the list
    p = problem(4 if slow(backend) else 17, V=211, device=device_of(backend), ignored=0.0)
    lists = cached(p, 8, tail)
    z = (p.hidden @ p.weight.T).detach()

    def run(each):
        leaf = z.clone().requires_grad_()
        out = fk.kd_loss(leaf, lists, p.labels, each, reduction="none", backend=backend)
        return out.loss.detach().double(), gradients(out.loss.sum(), [leaf])[0].double()

    whole, parts = run(objective), [(weight, run(part)) for weight, part in objective.parts]
    for i, found in enumerate(whole):
        assert relative(found, sum(weight * part[i] for weight, part in parts)) < 4e-6
    leaf = z.double().requires_grad_()
    expected = reference_kd_loss(leaf, lists, p.labels, objective, reduction="none")
    assert relative(whole[0], expected.loss) < 4e-6
    loose = summands(objective) & JUMPS
    assert relative(whole[1], gradients(expected.loss.sum(), [leaf])[0]) < (1e-2 if loose else 1e-5)


@pytest.mark.parametrize("backend", ROWS, indirect=True)
def test_weights_of_0_and_1(backend):
    """Nothing of a term of weight 0 is left, even if it is infinite; its gate is still told."""
    z, z_t, labels = make(*size(backend), near=False)
    plain = fk.GeneralizedJSD(beta=0.3)
    alone = call(backend, z, z_t, labels, plain)
    for none in (fk.SFT(), fk.ReverseKD(), fk.SelfEvolution(gamma=1.0), o.Acceptance(), o.ZLoss()):
        found = call(backend, z, z_t, labels, 1.0 * plain + 0.0 * none)
        assert relative(found.loss, alone.loss) < 1e-6 and relative(found.dlogits, alone.dlogits) < 1e-6
        if none.spec.gate:
            assert torch.equal(found.is_hard, found.difficulty > 1.0)
    z_t[0, 5] = -math.inf
    found, alone = (call(backend, z, z_t, labels, x) for x in (plain + 0.0 * fk.ReverseKD(lam=1.0), plain))
    assert relative(found.loss, alone.loss) < 1e-6 and relative(found.dlogits, alone.dlogits) < 1e-6


def test_one_call_of_the_row_a_chunk(monkeypatch):
    """However many terms: nothing is read or made again for one of them."""
    calls = []

    def get_row(backend):
        def row(inputs, outputs):
            calls.append(len(inputs.labels))
            dispatch_row(inputs, outputs)

        return row

    dispatch_row = dispatch.get_row("torch")
    monkeypatch.setattr(dispatch, "get_row", get_row)
    p = problem(N=24, V=300, ignored=0.0)
    budget = 6 * (4 * 300 * 2 + 8 * (24 + 40) + 200)
    for objective in (fk.SFT(), 0.5 * fk.SFT() + 0.5 * fk.GeneralizedJSD(), *SUMS):
        calls.clear()
        fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend="torch", engine="chunked")
        assert calls == [24], objective
        calls.clear()
        fk.kd_loss(
            p.student(), p.teacher(), p.labels, objective, backend="torch", engine="chunked", memory_budget=budget
        )
        assert sum(calls) == 24 and len(calls) > 1, objective


@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_a_sum_ranks_by_its_gated_term(backend):
    objective = 0.5 * fk.SelfEvolutionTopK(lam=0.2, fraction=0.3) + 0.5 * fk.NoEvo(lam=0.9)
    p = problem(N=20, V=211, device=device_of(backend))
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend=backend)
    alone = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolutionTopK(lam=0.2, fraction=0.3), backend=backend)
    assert torch.equal(out.is_hard, alone.is_hard) and relative(out.difficulty, alone.difficulty) < 1e-6
