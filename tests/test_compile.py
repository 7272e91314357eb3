"""Ops under opcheck and torch.compile, autocast, GradScaler and checkpointing."""

from __future__ import annotations

import pytest
import torch

import fused_kd as fk
from fused_kd.ops import Options

from .problems import gradients, problem, relative


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
    for g, r in zip(gradients(loss.sum(), list(step.parameters())), ref, strict=True):
        assert relative(g, r) < 1e-6


def test_inductor_step():
    step, inputs = Step(), batch()
    compiled = torch.compile(step, fullgraph=True)
    assert relative(compiled(*inputs), step(*inputs)) < 1e-6
    compiled(*inputs).backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.norm() > 0 for x in step.parameters())


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
    scalars = torch.tensor(fk.SelfEvolution().scalars())
    options = Options(
        *fk.SelfEvolution().spec, cold_labels=False, logit_scale_s=1.0, softcap_s=0.0, logit_scale_t=1.0, softcap_t=0.0,
        tail="", vocab=53, ignore_index=-100, backend="torch", dtype=None, memory_budget=-1, validate=False,
        engine="chunked", grad_filter_eps=0.0,
    )  # fmt: skip
    args = (p.hidden, p.weight, p.bias, p.hidden_t, p.weight_t, None, None, p.labels, None, torch.ones(()), scalars)
    args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    torch.library.opcheck(torch.ops.fused_kd.kd.default, (*args, True, True, True, *options))
    torch.library.opcheck(torch.ops.fused_kd.kd.default, (*args, False, True, False, *options))
    torch.library.opcheck(torch.ops.fused_kd.scale_gradient.default, (args[0], torch.tensor(2.0), torch.bfloat16))


def test_autocast_rounds_operands_as_a_linear_layer_would():
    p = problem(std=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution())
        grads = gradients(out.loss, p.leaves)
    rounded = problem(std=3.0, dtype=torch.bfloat16)
    ref = fk.kd_loss(rounded.student(), rounded.teacher(), rounded.labels, fk.SelfEvolution())
    assert relative(out.loss, ref.loss) < 1e-6
    for g, r, x in zip(grads, gradients(ref.loss, rounded.leaves), p.leaves, strict=True):
        assert g.dtype == x.dtype == torch.float32
        assert relative(g, r) < 4e-3


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
    for x, r in zip(p.leaves, torch.autograd.grad(ref.loss * 2.0**14, p.leaves), strict=True):
        assert relative(x.grad, r) < 1e-3


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    p = problem()
    ref = gradients(fk.kd_loss(p.student(), p.teacher(), p.labels, fk.Skew()).loss, p.leaves)

    def loss(hidden, weight):
        return fk.kd_loss(fk.LMHead(hidden, weight), p.teacher(), p.labels, fk.Skew()).loss

    again = checkpoint(loss, p.hidden, p.weight, use_reentrant=False)
    for g, r in zip(gradients(again, p.leaves), ref, strict=True):
        assert torch.equal(g, r)


def test_module_moves_and_saves_like_any_other():
    criterion = fk.KDLoss(fk.SelfEvolution())
    assert list(criterion.state_dict()) == []
    assert list(criterion.parameters()) == []
    assert criterion.to(torch.bfloat16) is criterion
    assert torch.equal(criterion.scalars, torch.tensor(fk.SelfEvolution().scalars()))
    p = problem()
    expected = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.SelfEvolution()).loss
    assert torch.equal(criterion(p.student(), p.teacher(), p.labels), expected)
