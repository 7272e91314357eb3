"""Where the student excludes tokens of the target: a loss that may be infinite, and the gradient of the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.reference import reference_kd_loss
from fused_kd.rows.contract import Logits, RowInputs

from ..cuda_emulator import needs_cpp_compiler
from ..problems import CPU_BACKENDS, gradients, has_powers, may_overflow, relative
from .contract import scalars_of
from .ways import FORMS, WAYS, every_way, in_slices, in_turns, needs_interpreter, through_the_loss, variants

V, K, SPARED = 9, 3, 5


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """The student excludes one token, the label, what the teacher's list has, what it has not, both but for a token."""
    g = torch.Generator().manual_seed(0)
    z, z_t = torch.randn(6, V, generator=g), torch.randn(6, V, generator=g)
    listed = torch.zeros(6, V, dtype=torch.bool).scatter(1, z_t.topk(K).indices, True)
    labels = z_t.argmax(1)
    labels[2] = (~listed[2]).int().argmax()
    z[0, SPARED] = -math.inf
    z[1, labels[1]] = -math.inf
    z[2].masked_fill_(listed[2], -math.inf)
    z[3].masked_fill_(~listed[3], -math.inf)
    z[4].masked_fill_(~listed[4], -math.inf)
    z[5, 1:] = -math.inf
    labels[4] = (~listed[4]).int().argmax()
    return z, z_t, labels


@every_way()
def test_infinite_where_the_reference_is_and_its_gradient(way, form, cls):
    z, teacher, labels = rows()
    if form != "dense":
        teacher = fk.TopK(*teacher.log_softmax(1).sub(0.3 * (form != "renormalize")).topk(K), form)
    (objective,) = variants(cls, form, edges=False)
    for T in (1.0, 2.0) if form != "bucket" else (1.0,):
        out = way.run(z, teacher, labels, objective, T)
        leaf = z.double().requires_grad_()
        expected = reference_kd_loss(leaf, teacher, labels, objective, temperature=T, reduction="none")
        (gradient,) = gradients(expected.loss.sum(), [leaf])
        finite = expected.loss < math.inf
        assert torch.equal(out.loss < math.inf, finite)
        assert relative(out.loss[finite], expected.loss[finite]) < 4e-6
        logarithm = may_overflow(objective)  # its gradient has no limit where the sum is 0
        assert out.gradient.isfinite().all()
        for row in range(len(z)) if not logarithm else finite.nonzero().flatten().tolist():
            tight = 2e-5 if has_powers(objective) else 1e-5
            small = gradient[row].norm() < 1e-6 or (out.gradient[row] - gradient[row]).norm() < 1e-7
            assert relative(out.gradient[row], gradient[row]) < tight or small, (T, row)


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tail", FORMS[1:])
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "slices"])
def test_a_student_that_excludes_all_is_uniform(backend, tail, T):
    """Over its tokens, whatever the list has of them; a list may be short, and hold the whole vocabulary."""
    if T != 1.0 and tail == "bucket":
        return  # refused
    run = in_slices("torch") if backend == "slices" else through_the_loss(backend=backend)
    z, labels = torch.full((3, V), -math.inf), torch.tensor([0, 1, 2])
    log_probs = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01]).log().repeat(3, 1)
    log_probs[0, 3:] = log_probs[1, :3] = -math.inf
    lists = fk.TopK(log_probs, torch.arange(V).repeat(3, 1), tail)
    for objective in (fk.NoEvo(), fk.GeneralizedJSD(beta=0.0), fk.GeneralizedJSD(), fk.SelfEvolution(gamma=0.0)):
        out = run(z, lists, labels, objective, T)
        leaf = torch.zeros(3, V, dtype=torch.float64, requires_grad=True)
        expected = reference_kd_loss(leaf, lists, labels, objective, temperature=T, reduction="none")
        assert relative(out.loss, expected.loss) < 4e-6, objective
        assert relative(out.difficulty, expected.difficulty) < 4e-6, objective
        assert relative(out.gradient, gradients(expected.loss.sum(), [leaf])[0]) < 1e-5, objective
        excluding = reference_kd_loss(z, lists, labels, objective, temperature=T, reduction="none").loss
        assert relative(excluding, expected.loss) < 1e-12


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0])
def test_a_rank_without_columns_beside_a_side_that_excludes_all(T):
    objective, z_t = fk.NoEvo(lam=0.9), torch.randn(1, 6)
    for sides in ((torch.full((1, 6), -math.inf), z_t), (z_t, torch.full((1, 6), -math.inf))):
        student, teacher = (Logits(z, 1.0, None, False) for z in sides)
        scalars = scalars_of(objective, T)
        inputs = RowInputs(student, teacher, torch.tensor([1]), None, scalars, objective.spec, False)
        expected = reference_kd_loss(*sides, torch.tensor([1]), objective, temperature=T, reduction="none").loss
        assert relative(in_turns(inputs, (3, 3, 0), backend="torch")[0].loss, expected) < 4e-6


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_list_that_adds_up_to_more_than_1_excludes_the_others_from_a_head_too(backend):
    """A head's logits are finite; those of a list with a uniform tail need not be."""
    hidden, weight = torch.randn(1, 16), torch.randn(5, 16)
    lists = fk.TopK(torch.tensor([[0.5, 0.25, 0.26]]).log(), torch.tensor([[0, 1, 2]]), "uniform")
    for objective in (fk.ReverseKD(lam=0.6), fk.GeneralizedJSD(beta=1.0), fk.SkewReverse(alpha=0.0)):
        leaves = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        out = fk.kd_loss(fk.LMHead(leaves[0], weight), lists, torch.tensor([0]), objective, backend=backend)
        expected = reference_kd_loss(leaves[1] @ weight.double().T, lists, torch.tensor([0]), objective)
        assert out.loss == expected.loss == math.inf
        found, truth = (gradients(x.loss, [leaf])[0] for x, leaf in zip((out, expected), leaves, strict=True))
        assert relative(found, truth) < 4e-6


ALL_WAYS = [pytest.param(name, marks=marks) for name, (_, marks) in WAYS.items()]


@pytest.mark.parametrize("way", ALL_WAYS, indirect=True)
def test_what_one_side_excludes_and_the_other_has_none_of_is_nothing(way, request):
    """Its probability underflows: whatever stands for log 0 must not show."""
    g = torch.Generator().manual_seed(0)
    z, z_t, labels = torch.randn(4, 67, generator=g), torch.randn(4, 67, generator=g), torch.arange(4)
    gone, low = torch.arange(67) >= 30, 400.0 * (torch.arange(67) >= 30)
    alone = "streaming" in request.node.name or "triton slices" in request.node.name  # without AdaptiveKL
    objectives = [
        fk.ReverseKD(lam=1.0),
        fk.GeneralizedJSD(),
        fk.objectives.ToDi(),
        *([] if alone else [fk.AdaptiveKL()]),
    ]
    excluding, vanishing = z.masked_fill(gone, -math.inf), z_t - low
    excluding[3] = -math.inf  # all of them, hence none
    for student, teacher in ((excluding, vanishing), (vanishing, excluding)):
        for objective in objectives:
            out = way.run(student, teacher, labels, objective, 2.5)
            leaf = student.double().requires_grad_()
            expected = reference_kd_loss(leaf, teacher, labels, objective, temperature=2.5, reduction="none").loss
            (gradient,) = gradients(expected.sum(), [leaf])
            assert relative(out.loss, expected) < 1e-5, objective
            assert relative(out.gradient, gradient) < 1e-5, objective


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_scale_decides_what_a_bias_excludes(backend):
    """By the final logit."""
    z = torch.tensor([[0.1, 0.2, 0.3]])
    for bias, scale in ((-1e17, 30.0), (-1e9, 1e12), (1e17, -30.0)):
        head = fk.LMHead(torch.ones(1, 16), torch.full((3, 16), 1e-3 / scale), torch.tensor([0.0, 0.0, bias]), scale)
        out = fk.kd_loss(z, head, torch.tensor([0]), fk.ReverseKD(), backend=backend)
        assert out.loss == math.inf


SCALED = [
    *CPU_BACKENDS,
    pytest.param("cuda", marks=needs_cpp_compiler),
    pytest.param("streaming", marks=needs_interpreter),
]


@pytest.mark.parametrize("backend", SCALED)
def test_scales(backend, request):
    """A bias excludes the last tokens; with a scale at or below 0 it would make them NaN or +inf."""
    if backend == "cuda":
        request.getfixturevalue("emulated")
    options = {"backend": "triton", "engine": "streaming"} if backend == "streaming" else {"backend": backend}
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = torch.randn(3, 16, generator=g), torch.randn(V, 16, generator=g), torch.zeros(V)
    bias[V - 2 :] = -math.inf
    z_t, labels = torch.randn(3, V, generator=g), torch.zeros(3, dtype=torch.long)
    z_t[:, V - 2 :] = -math.inf
    for scale, softcap in itertools.product((1e9, 1e12, 0.0, -1.0), (None, 5.0)):
        head = fk.LMHead(hidden / max(abs(scale), 1.0), weight, bias, logit_scale=scale, softcap=softcap)
        out = fk.kd_loss(head, z_t, labels, fk.NoEvo(), reduction="none", **options)
        expected = reference_kd_loss(head, z_t, labels, fk.NoEvo(), reduction="none").loss
        if expected[0].isnan():
            assert out.loss.isnan().all(), (scale, softcap)
        else:
            assert relative(out.loss, expected) < 1e-5, (scale, softcap)
