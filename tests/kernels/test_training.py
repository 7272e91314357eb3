"""How models are trained: tied, frozen and low-rank heads, accumulation, loss scaling, checkpoints."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_kd as fk
from fused_kd.reference import reference_kd_loss

from ..problems import Problem, gradients, problem, relative
from .contract import NATIVE, TORCH, TRITON, cases
from .test_lists import cached

# Nothing of it depends on the row, but which buffers it writes: a list's and a dense one's, in the interpreter once.
CASES = cases(["dense", "bucket"], backends=[TORCH, NATIVE])
TIGHT = 4e-6
OBJECTIVE = fk.SelfEvolution(gamma=1.0)

trained = pytest.mark.parametrize("form, backend", CASES, indirect=["backend"])


def teacher_of(p: Problem, form: str) -> fk.LMHead | fk.TopK:
    return p.teacher() if form == "dense" else cached(p, 8, form)


def same_gradients(make, leaves, backend: str, tight: float = TIGHT) -> list[torch.Tensor]:
    """``make(loss_function)`` by the library and by the oracle."""
    actual = gradients(make(lambda *args, **options: fk.kd_loss(*args, backend=backend, **options).loss), leaves)
    expected = gradients(make(lambda *args, **options: reference_kd_loss(*args, **options).loss), leaves)
    for a, r in zip(actual, expected, strict=True):
        assert r.norm() > 0 and relative(a, r) < tight
    return actual


@pytest.mark.parametrize("form, backend", [*CASES, *cases(["dense"], backends=[TRITON])], indirect=["backend"])
def test_every_choice_of_what_is_trained(form, backend):
    """Head, hidden states and bias, frozen or not: what is trained gets the same gradient whatever else is."""
    whole = problem(N=7, V=61, bias=True)
    teacher = teacher_of(whole, form)
    loss = fk.kd_loss(whole.student(), teacher, whole.labels, OBJECTIVE, backend=backend).loss
    everything = gradients(loss, whole.leaves)
    reductions = ("mean",) if backend == "triton" else ("mean", "none")  # the interpreter is slow
    for wanted, reduction in product(product((False, True), repeat=3), reductions):
        p = problem(N=7, V=61, bias=True)
        for x, on in zip(p.leaves, wanted, strict=True):
            x.requires_grad_(on)
        out = fk.kd_loss(p.student(), teacher, p.labels, OBJECTIVE, backend=backend, reduction=reduction)
        assert out.loss.requires_grad == any(wanted)
        assert not out.difficulty.requires_grad and not out.is_hard.requires_grad
        if any(wanted):
            (out.loss.sum() / (1 if reduction == "mean" else (p.labels != -100).sum())).backward()
        for x, on, r in zip(p.leaves, wanted, everything, strict=True):
            assert relative(x.grad, r) < 1e-6 if on else x.grad is None


@trained
def test_tied_embedding_and_head(form, backend):
    p = problem(N=12, V=61)
    tokens = torch.randint(0, 61, (12,))
    embedding = nn.Embedding(61, 24)
    body = nn.Linear(24, 24)

    def make(loss):
        return loss(fk.LMHead(body(embedding(tokens)), embedding.weight), teacher_of(p, form), p.labels, OBJECTIVE)

    torch.manual_seed(1)
    state = torch.get_rng_state()

    def seeded(loss):
        torch.set_rng_state(state)  # a cached teacher is shuffled
        return make(loss)

    (tied, *_) = same_gradients(seeded, [embedding.weight, *body.parameters()], backend)
    frozen_head = fk.LMHead(body(embedding(tokens)), embedding.weight.detach())
    torch.set_rng_state(state)
    (one_use,) = gradients(
        fk.kd_loss(frozen_head, teacher_of(p, form), p.labels, OBJECTIVE, backend=backend).loss, [embedding.weight]
    )
    assert relative(tied, one_use) > 0.5


@trained
def test_low_rank_adapter_on_the_head(form, backend):
    p = problem(N=7, V=61)
    teacher = teacher_of(p, form)
    W = p.weight.detach()
    A, B = torch.randn(4, 24).requires_grad_(), (0.05 * torch.randn(61, 4)).requires_grad_()

    def make(loss):
        return loss(fk.LMHead(p.hidden, W + 0.5 * (B @ A)), teacher, p.labels, OBJECTIVE)

    same_gradients(make, [A, B, p.hidden], backend)


@pytest.mark.parametrize("objective", [OBJECTIVE, fk.ForwardKD()], ids=lambda o: o.name)
@trained
def test_accumulation_with_num_items_is_one_big_batch(form, backend, objective):
    """Sequences with shifted labels, padded and weighted, in micro-batches of 1 and 3."""
    p = problem(N=12, V=61)
    lists = cached(p, 8, form) if form != "dense" else None
    weights = torch.rand(4, 3)

    def part(which: slice, **options):
        h, h_t, y = (x.reshape(4, 3, *x.shape[1:])[which] for x in (p.hidden, p.hidden_t, p.labels))
        teacher: fk.LMHead | fk.TopK = fk.LMHead(h_t, p.weight_t)
        if lists is not None:
            teacher = fk.TopK(*(x.reshape(4, 3, -1)[which] for x in (lists.log_probs, lists.indices)), form)
        return fk.kd_loss(
            fk.LMHead(h, p.weight), teacher, y, objective, token_weights=weights[which], shift=True, backend=backend,
            **options,
        ).loss  # fmt: skip

    whole = part(slice(None))
    following = torch.cat([p.labels.view(4, 3)[:, 1:], torch.full((4, 1), -100)], 1)
    items = weights[following != -100].sum()
    expected = gradients(whole, p.leaves)
    for num_items in (items,) if backend == "triton" else (items, float(items)):
        for x in p.leaves:
            x.grad = None
        parts = [part(which, num_items=num_items) for which in (slice(0, 1), slice(1, 4))]
        for loss in parts:
            loss.backward()
        assert relative(sum(parts), whole) < 1e-6
        for x, r in zip(p.leaves, expected, strict=True):
            assert relative(x.grad, r) < TIGHT


@pytest.mark.parametrize("reentrant", [False, True])
@trained
def test_checkpoint_of_head_and_loss(form, backend, reentrant):
    p = problem(N=7, V=61)
    teacher = teacher_of(p, form)

    def loss(hidden, weight):
        return fk.kd_loss(fk.LMHead(hidden, weight), teacher, p.labels, OBJECTIVE, backend=backend).loss

    ref = gradients(loss(p.hidden, p.weight), p.leaves)
    checkpoint(loss, p.hidden, p.weight, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, r) for x, r in zip(p.leaves, ref, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@trained
def test_grad_scaler_steps_and_skips(form, backend, dtype):
    """Under autocast with master weights: the unscaled gradient is the plain one; an overflow skips the step."""
    p = problem(N=7, V=61, std=1.0)
    teacher = teacher_of(p, form)
    optimizer = torch.optim.SGD(p.leaves, lr=1.0)

    def loss():
        with torch.autocast("cpu", dtype):
            return fk.kd_loss(p.student(), teacher, p.labels, OBJECTIVE, backend=backend).loss

    plain = gradients(loss(), p.leaves)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    for x, r in zip(p.leaves, plain, strict=True):
        assert relative(x.grad, r) < 1e-6
    before = p.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(p.weight, before) and scaler.get_scale() == 2.0**12
    optimizer.zero_grad()
    before = p.weight.detach().clone()
    overflowing = torch.amp.GradScaler("cpu", init_scale=3e38)
    overflowing.scale(loss() * 1e3).backward()
    overflowing.step(optimizer)
    overflowing.update()
    assert torch.equal(p.weight, before) and overflowing.get_scale() < 3e38


@pytest.mark.parametrize("reduction", ["mean", "none"])
@trained
def test_second_derivatives_and_function_transforms_are_refused(form, backend, reduction):
    p = problem(N=7, V=61)
    teacher = teacher_of(p, form)

    def loss(hidden):
        student = fk.LMHead(hidden, p.weight)
        return fk.kd_loss(student, teacher, p.labels, OBJECTIVE, reduction=reduction, backend=backend).loss.sum()

    with pytest.raises(RuntimeError, match="fused_kd losses have no second derivative: create_graph=True"):
        torch.autograd.grad(loss(p.hidden), p.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(p.hidden.detach())


@trained
def test_second_backward_repeats_the_first(form, backend):
    """Also where the first was scaled in place, and with the rows' own upstream gradients."""
    p = problem(N=7, V=61)
    teacher = teacher_of(p, form)
    for reduction, up in (("mean", torch.tensor(3.0)), ("none", torch.randn(7))):
        loss = fk.kd_loss(p.student(), teacher, p.labels, OBJECTIVE, reduction=reduction, backend=backend).loss
        first = [g.clone() for g in torch.autograd.grad(loss, p.leaves, up, retain_graph=True)]
        for _ in range(2):
            again = torch.autograd.grad(loss, p.leaves, up, retain_graph=True)
            assert all(relative(a, f) < 1e-7 for a, f in zip(again, first, strict=True))
