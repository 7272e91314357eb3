"""Ops under opcheck and torch.compile, autocast and GradScaler."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fused_kd as fk
from fused_kd.engines.problem import Problem, Side, Wanted
from fused_kd.ops import pack, unpack
from fused_kd.rows.contract import Shards

from ..problems import furthest, gradients, problem, relative


class Step(torch.nn.Module):
    def __init__(self, V: int = 211, **options) -> None:
        super().__init__()
        self.body = torch.nn.Linear(12, 16)
        self.head = torch.nn.Linear(16, V, bias=False)
        self.criterion = fk.KDLoss(fk.SelfEvolution(gamma=1.0), **options)

    def forward(self, x, teacher_hidden, teacher_weight, labels):
        hidden = self.body(x)
        return self.criterion(fk.LMHead(hidden, self.head.weight), fk.LMHead(teacher_hidden, teacher_weight), labels)


def batch(N: int = 19, V: int = 211):
    labels = torch.randint(0, V, (N,))
    labels[::4] = -100
    return torch.randn(N, 12), torch.randn(N, 8), torch.randn(V, 8), labels


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_step_gives_the_eager_gradients(reduction):
    step, inputs = Step(reduction=reduction), batch()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ref = gradients(step(*inputs).sum(), list(step.parameters()))
    loss = compiled(*inputs)
    assert furthest(gradients(loss.sum(), list(step.parameters())), ref) < 1e-6


def test_inductor_step():
    """The head's part alone: the body's kernels are torch's own, and take as long to compile."""
    p = problem(N=19, V=211)
    criterion = fk.KDLoss(fk.SelfEvolution(gamma=1.0))

    def step(hidden, weight):
        return criterion(fk.LMHead(hidden, weight), p.teacher(), p.labels)

    loss, ref = torch.compile(step, fullgraph=True)(p.hidden, p.weight), step(p.hidden, p.weight)
    assert relative(loss, ref) < 1e-6
    assert furthest(gradients(loss, p.leaves), gradients(ref, p.leaves)) < 1e-6


def test_annealing_does_not_recompile():
    step, inputs = Step(), batch()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for beta in (0.5, 0.6, 0.7, 1.0):
        step.criterion.objective = fk.SelfEvolution(gamma=1.0, beta=beta)
        assert relative(compiled(*inputs), step(*inputs)) < 1e-6
    assert counter.frame_count == 1


def test_opcheck():
    p = problem(N=11, V=53, bias=True)
    hidden = p.hidden.detach()
    tokens = torch.ops.fused_kd.tokens
    given = p.labels, torch.rand(11), None, 53, -100, True, False, False, torch.device("cpu")
    torch.library.opcheck(tokens.default, given)
    for wanted in (Wanted(True, True, True), Wanted(False, True, False)):
        call = Problem(
            student=Side(hidden, p.weight.detach(), p.bias.detach()), teacher=Side(p.hidden_t, p.weight_t),
            labels=tokens(*given)[0], weights=None, scale=torch.ones(()),
            scalars=torch.tensor([fk.SelfEvolution().scalars()]), wanted=wanted, spec_code=fk.SelfEvolution().spec.code,
            cold_labels=False, vocab=53, dtype=None, memory_budget=None, engine="chunked", backend="torch",
        )  # fmt: skip
        torch.library.opcheck(torch.ops.fused_kd.kd.default, pack(call))
    torch.library.opcheck(torch.ops.fused_kd.scale_gradient.default, (hidden, torch.tensor(2.0), torch.bfloat16))


def test_what_is_packed_is_unpacked():
    labels, lists = torch.tensor([0, -1, -2]), torch.zeros(3, 2)
    teacher = Side(lists, indices=lists.long(), tail="bucket")
    for other in (None, teacher):
        call = Problem(
            student=Side(torch.zeros(3, 4), torch.zeros(5, 4), None, 2.0, 3.0), teacher=other, labels=labels,
            weights=None, scale=torch.ones(()), scalars=torch.zeros(1, 1, 11), wanted=Wanted(True, False, True),
            spec_code=fk.SelfEvolution().spec.code, cold_labels=True, vocab=5, dtype=torch.bfloat16, memory_budget=7,
            engine="auto", backend="torch", grad_filter_eps=0.5, validate=True, shards=Shards("g", 1, (2, 3)),
            sum_hidden=False, statistics=9,
        )  # fmt: skip
        again = unpack(pack(call))
        for name in (field.name for field in dataclasses.fields(Problem)):
            found, expected = getattr(again, name), getattr(call, name)
            if isinstance(expected, Side):
                assert vars(found) == vars(expected)
            else:
                assert found is expected or found == expected


def test_autocast_rounds_operands_as_a_linear_layer_would():
    p = problem(std=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution())
        grads = gradients(out.loss, p.leaves)
    rounded = problem(std=3.0, dtype=torch.bfloat16)
    ref = fk.kd_loss(rounded.student(), rounded.teacher(), rounded.labels, fk.SelfEvolution())
    assert relative(out.loss, ref.loss) < 1e-6
    assert {g.dtype for g in grads} == {torch.float32}
    assert furthest(grads, gradients(ref.loss, rounded.leaves)) < 4e-3


def test_autocast_casts_a_master_weight_for_low_precision_hidden_states():
    p = problem(std=3.0)
    low = p.hidden.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = fk.kd_loss(fk.LMHead(low, p.weight), p.teacher(), p.labels, fk.NoEvo())
    (g,) = gradients(out.loss, [p.weight])
    assert g.dtype == torch.float32


def test_fp16_gradients_survive_until_the_loss_scale_arrives():
    p = problem(N=400, V=1000, ignored=0.0, std=1.0, dtype=torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    loss = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo()).loss
    scaler.scale(loss).backward()
    ref = fk.reference.reference_kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo())
    assert furthest([x.grad for x in p.leaves], gradients(ref.loss * 2.0**14, p.leaves)) < 1e-3
