"""Nothing depends on what is set around a call, or on which rows stand together in it."""

from __future__ import annotations

import math

import pytest
import torch

import fused_kd as fk
from fused_kd.engines.problem import largest
from fused_kd.inputs import TAILS
from fused_kd.reference import reference_kd_loss

from ..problems import OBJECTIVES, gradients, label, problem, relative
from .contract import NATIVE, TORCH, TRITON, cases
from .test_lists import cached
from .ways import refused

INF = math.inf
HOST_BACKENDS = [TORCH, NATIVE]
ON_CPU = [TORCH, NATIVE, TRITON]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


FORMS = [*cases(["dense", "logits", *TAILS], backends=HOST_BACKENDS), *cases(["bucket"], backends=[TRITON])]


@pytest.mark.parametrize("form, backend", FORMS, indirect=["backend"])
def test_default_dtype(form, backend, default_dtype):
    """Loss and gradients are the same bits, whatever tensors are made of by default."""
    p = problem(N=5, V=61, bias=True)
    lists = cached(p, 8, form) if form in TAILS else None
    z = (p.hidden @ p.weight.T).detach()
    objectives = [o for o in OBJECTIVES if not refused(o.spec, form if form in TAILS else "dense")]
    ways = [{}, {"reduction": "sum"}, {"num_items": 7}, {"token_weights": torch.rand(5)}]
    if backend == "triton":  # the interpreter is slow
        objectives, ways, p.labels[1:] = [fk.SelfEvolution()], ways[2:3], -100
    for objective in objectives:
        for options in ways if label(objective) == "self_evolution" else ways[:1]:
            found = []
            for dtype in (torch.float32, default_dtype):
                torch.set_default_dtype(dtype)
                leaves = p.leaves
                student = p.student()
                if form == "logits":
                    leaves = [student := z.clone().requires_grad_()]
                out = fk.kd_loss(student, lists or p.teacher(), p.labels, objective, backend=backend, **options)
                found.append([out.loss.detach(), *gradients(out.loss.sum(), leaves)])
                torch.set_default_dtype(torch.float32)
            for other, usual in zip(found[1], found[0], strict=True):
                assert other.dtype == usual.dtype and torch.equal(other, usual), (objective, options)


@pytest.mark.parametrize("backend", ON_CPU, indirect=True)
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_an_empty_list_is_uniform(tail, backend):
    z, y = torch.randn(2, 40), torch.tensor([1, 39])
    lists = fk.TopK(torch.full((2, 2), -INF), torch.zeros(2, 2).long(), tail)
    for objective in (fk.GeneralizedJSD(beta=0.0), fk.TotalVariation(), fk.AdaptiveKL(), fk.SelfEvolution()):
        if backend == "triton" and objective.name == "adaptive_kl":
            continue
        out = fk.kd_loss(z, lists, y, objective, backend=backend, reduction="none")
        expected = reference_kd_loss(z, lists, y, objective, reduction="none")
        assert relative(out.loss, expected.loss) < 2e-6 and relative(out.difficulty, expected.difficulty) < 2e-6


def test_the_most_difficult_are_as_many_as_said():
    for fraction, n, expected in ((1.0, 3_000_000, 3_000_000), (0.5, 4_000_000, 2_000_000), (0.1, 10, 1), (0.3, 7, 3)):
        share = torch.tensor(fk.SelfEvolutionTopK(fraction=fraction).scalars()[0].fraction)
        labels = torch.zeros(n, dtype=torch.long)
        assert largest(torch.rand(n), labels, share).sum() == expected


@pytest.mark.parametrize("backend", HOST_BACKENDS, indirect=True)
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_an_offset_of_a_row_whose_label_both_exclude(offset, backend):
    z, z_t, y = torch.randn(4, 40), torch.randn(4, 40), torch.tensor([1, 5, 9, 39])
    z = (z + offset) - offset + offset  # what is left of it in fp32
    for row, its in enumerate(y):
        z[row, its] = z_t[row, its] = -INF
    for objective in (fk.ForwardKD(lam=1.0), fk.ReverseKD(lam=1.0)):
        leaves = [z.clone().requires_grad_(), z.double().requires_grad_()]
        out = fk.kd_loss(leaves[0], z_t, y, objective, backend=backend)
        expected = reference_kd_loss(leaves[1], z_t, y, objective)
        assert relative(out.loss.detach(), expected.loss.detach()) < 4e-6
        assert relative(gradients(out.loss, leaves[:1])[0], gradients(expected.loss, leaves[1:])[0]) < 4e-6


@pytest.mark.parametrize("backend", HOST_BACKENDS, indirect=True)
def test_a_student_that_excludes_all_beside_a_teacher_that_excludes_the_label(backend):
    """The row's result is its own, also beside one that is far off."""
    z, z_t, y = torch.full((2, 40), -INF), torch.randn(2, 40), torch.tensor([1, 1])
    z[1], z_t[0, 1] = torch.randn(40) + 100.0, -INF
    together = fk.kd_loss(z, z_t, y, fk.NoEvo(), backend=backend, reduction="none").loss
    alone = fk.kd_loss(z[:1], z_t[:1], y[:1], fk.NoEvo(), backend=backend, reduction="none").loss
    expected = reference_kd_loss(z, z_t, y, fk.NoEvo(), reduction="none").loss
    assert relative(together, expected) < 4e-6 and relative(alone, expected[:1]) < 4e-6


@pytest.mark.parametrize("backend", HOST_BACKENDS, indirect=True)
def test_a_bias_that_excludes_only_when_rounded(backend):
    hidden, weight = (torch.randn(6, 8) / 2).half(), (torch.randn(33, 8) / 2).half()
    bias, y = torch.zeros(33), torch.zeros(6, dtype=torch.long)
    bias[20:] = -1e9
    head, z = fk.LMHead(hidden, weight, bias), torch.randn(6, 33)
    assert fk.kd_loss(head, z, y, fk.ForwardKD(), backend=backend).loss == INF
    loss = fk.kd_loss(z.requires_grad_(), head, y, fk.ReverseKD(), backend=backend).loss
    assert loss == INF and gradients(loss, [z])[0].isfinite().all()


@pytest.mark.parametrize("backend", ON_CPU, indirect=True)
def test_weight_0_does_not_hide_nan(backend):
    z, z_t, y = torch.randn(6, 33), torch.randn(6, 33), torch.zeros(6, dtype=torch.long)
    z[0, 3], z[1, 0], weights = math.nan, -INF, torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    for rows, check in ((slice(0, 6), torch.isnan), (slice(1, 6), torch.isfinite)):
        leaf = z[rows].clone().requires_grad_()
        args = leaf, z_t[rows], y[rows], fk.ForwardKD(lam=0.5)
        loss = fk.kd_loss(*args, token_weights=weights[rows], backend=backend).loss
        expected = reference_kd_loss(*args, token_weights=weights[rows]).loss
        assert check(loss) and check(expected)
        assert gradients(loss, [leaf])[0].isfinite().all() == check(torch.tensor(1.0)).item()


def test_the_reference_shows_nan():
    z, y = torch.randn(3, 9), torch.zeros(3, dtype=torch.long)
    z_t = z.clone()
    z_t[1, 4] = math.nan
    for objective in (fk.ReverseKD(lam=1.0), fk.SkewReverse(), fk.ForwardKD(lam=0.0), fk.SkewTeacher(lam=0.0)):
        loss = reference_kd_loss(z, z_t, y, objective, reduction="none").loss
        assert loss.isnan().tolist() == [False, True, False], objective
