"""Statistics by name: what a call tells beside its loss, and what it refuses to."""

from __future__ import annotations

import pytest
import torch

import fused_kd as fk
from fused_kd import objectives as o
from fused_kd.terms import STATISTICS

from ..kernels.test_lists import cached
from ..kernels.test_row_statistics import OF_STUDENT, truth
from ..problems import CPU_BACKENDS, gradients, problem, relative


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_by_name_in_the_shape_of_the_labels(backend, T):
    p = problem(8, V=101, ignored=0.3)
    shape, valid = (2, 4), (p.labels != -100).reshape(2, 4)
    student, teacher = (
        fk.LMHead(p.hidden.reshape(2, 4, -1), p.weight),
        fk.LMHead(p.hidden_t.reshape(2, 4, -1), p.weight_t),
    )
    objective = fk.SelfEvolution(lam=0.3, gamma=3.0)
    options = {"temperature": T, "backend": backend}
    out = fk.kd_loss(student, teacher, p.labels.reshape(shape), objective, statistics=STATISTICS, **options)
    expected = truth(
        p.hidden.detach() @ p.weight.detach().T, p.hidden_t @ p.weight_t.T, p.labels.clamp(min=0), objective, T
    )
    assert list(out.statistics) == list(STATISTICS)
    for name, told in out.statistics.items():
        assert told.shape == shape and not told.requires_grad and not told[~valid].any()
        assert torch.allclose(told[valid].double(), expected[name].reshape(shape)[valid], rtol=1e-5, atol=2e-6), name
    plain = fk.kd_loss(student, teacher, p.labels.reshape(shape), objective, **options)
    assert plain.statistics == {} and torch.equal(plain.is_hard, out.is_hard)
    assert relative(out.loss, plain.loss) < 1e-6
    for a, b in zip(gradients(out.loss, p.leaves), gradients(plain.loss, p.leaves), strict=True):
        assert relative(a, b) < 1e-6


def test_some_in_any_order_over_chunks():
    p = problem(24, V=300)
    wanted = ["overlap", "kl"]
    whole = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), statistics=wanted)
    budget = 6 * (4 * 300 * 2 + 8 * (24 + 40) + 200)
    small = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), statistics=wanted, memory_budget=budget)
    assert list(whole.statistics) == wanted
    for name in wanted:
        assert torch.allclose(whole.statistics[name], small.statistics[name], rtol=1e-5)
    ranked = fk.kd_loss(
        p.student(), p.teacher(), p.labels, fk.SelfEvolutionTopK(), statistics=wanted, memory_budget=budget
    )
    assert torch.allclose(ranked.statistics["kl"], whole.statistics["kl"], rtol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_without_a_teacher(backend):
    p = problem(6, V=101, ignored=0.0)
    for objective in (fk.SFT(), fk.SFT() + 1e-4 * o.ZLoss()):
        out = fk.kd_loss(p.student(), None, p.labels, objective, statistics=OF_STUDENT, backend=backend)
        z = p.hidden.detach() @ p.weight.detach().T
        expected = truth(z, z, p.labels, objective, 1.0)
        for name in OF_STUDENT:
            assert torch.allclose(out.statistics[name].double(), expected[name], rtol=1e-5, atol=1e-6), name


def test_what_is_refused():
    p = problem(6, V=101)

    def ask(*names, teacher=None, objective=None, **options):
        teacher, objective = teacher or p.teacher(), objective or fk.NoEvo()
        return fk.kd_loss(p.student(), teacher, p.labels, objective, statistics=names, **options)

    for names, options, message in (
        (["entropy"], {}, "statistics must be among 'log_sum_exp_s', 'log_sum_exp_t', .*, got 'entropy'"),
        (
            ["kl"],
            {"objective": fk.SFT()},
            "statistics must be among 'log_sum_exp_s', 'entropy_s', .* without a teacher",
        ),
        (["kl"], {"teacher": cached(p, 4)}, "statistics must be empty with a TopK"),
        (["kl"], {"engine": "streaming", "backend": "triton"}, "engine='streaming' tells no statistics"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(*names, **options)
    # A teacher that is not read may be anything.
    assert ask("log_q_y", objective=fk.SFT(), teacher=cached(p, 4)).statistics.keys() == {"log_q_y"}


def test_all_ignored_and_none():
    p = problem(4, V=33, ignored=1.1)
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), statistics=STATISTICS)
    assert all(told.shape == (4,) and not told.any() for told in out.statistics.values())
    empty = fk.kd_loss(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0).long(), fk.NoEvo(), statistics=["kl"])
    assert empty.statistics["kl"].shape == (0,)


def test_in_a_compiled_step():
    p = problem(9, V=53)
    criterion = fk.KDLoss(fk.SelfEvolution(), backend="torch")

    def step(hidden):
        out = criterion.evaluate(fk.LMHead(hidden, p.weight), p.teacher(), p.labels, statistics=["kl", "top_1"])
        return out.loss, out.statistics["kl"], out.statistics["top_1"]

    for a, b in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(p.hidden), step(p.hidden), strict=True):
        assert relative(a, b) < 1e-6
