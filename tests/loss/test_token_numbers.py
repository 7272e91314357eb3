"""Numbers that are tensors: each token's loss is that of its own numbers, whatever is done around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_kd as fk
from fused_kd import objectives as o

from ..kernels.test_token_scalars import of
from ..problems import CPU_BACKENDS, Problem, furthest, gradients, needs_compiler, problem, relative

HOST = ["torch", pytest.param("native", marks=needs_compiler)]
N = 18
G = torch.Generator().manual_seed(5)
LAM, BETA, WEIGHT = (torch.rand(N, generator=G) * 0.8 + 0.1 for _ in range(3))
GAMMA, T = torch.rand(N, generator=G) * 5, torch.rand(N, generator=G) * 2 + 0.5
OBJECTIVES = {
    "forward_kd": fk.ForwardKD(lam=LAM),
    "self_evolution": fk.SelfEvolution(lam=LAM, beta=BETA, gamma=GAMMA, floor=0.1),
    "sum": WEIGHT * fk.SFT() + BETA * fk.GeneralizedJSD(beta=LAM) + 1e-3 * o.ZLoss(),
}


def loop(p: Problem, objective, temperature, labels: Tensor) -> Tensor:
    """Each token by itself, with plain numbers; differentiable."""
    losses = []
    for i in range(N):
        own = temperature[i].item() if isinstance(temperature, Tensor) else temperature
        out = fk.kd_loss(
            fk.LMHead(p.hidden[i : i + 1], p.weight), fk.LMHead(p.hidden_t[i : i + 1], p.weight_t),
            labels[i : i + 1], of(objective, i), temperature=own, reduction="none", backend="torch",
        )  # fmt: skip
        losses.append(out.loss)
    return torch.cat(losses)


@pytest.mark.parametrize("temperature", [1.0, T], ids=["1", "each"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("backend", HOST)
def test_a_call_is_the_loop_over_its_tokens(name, temperature, backend):
    """With ignored tokens, reductions, chunks of a memory budget."""
    p, objective = problem(N, V=211, ignored=0.3), OBJECTIVES[name]
    alone = loop(p, objective, temperature, p.labels)
    per_token = 4 * 211 * 2 + 8 * (24 + 40) + 16
    for options in ({}, {"memory_budget": 5 * per_token, "engine": "chunked"}):
        out = fk.kd_loss(
            p.student(), p.teacher(), p.labels, objective, temperature=temperature, reduction="none", backend=backend,
            **options,
        )  # fmt: skip
        upstream = torch.rand(N)
        assert relative(out.loss, alone) < 3e-6 and not out.loss[p.labels == -100].any()
        found = torch.autograd.grad(out.loss, p.leaves, upstream)
        assert furthest(found, torch.autograd.grad(alone, p.leaves, upstream, retain_graph=True)) < 1e-5
        mean = fk.kd_loss(
            p.student(), p.teacher(), p.labels, objective, temperature=temperature, backend=backend, **options
        ).loss
        assert relative(mean, alone.sum() / (p.labels != -100).sum()) < 3e-6


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_in_the_shape_of_the_labels(backend, shift):
    """(B, S), 0-d, other dtypes and strides; with ``shift`` a number is that of the position that predicts."""
    p = problem(N, V=101, ignored=0.2)
    shape = (3, 6)
    options = {"reduction": "none", "backend": backend, "shift": shift}

    def run(objective, temperature):
        student = fk.LMHead(p.hidden.reshape(*shape, -1), p.weight)
        teacher = fk.LMHead(p.hidden_t.reshape(*shape, -1), p.weight_t)
        out = fk.kd_loss(student, teacher, p.labels.reshape(shape), objective, temperature=temperature, **options)
        return out.loss, *gradients(out.loss.sum(), p.leaves)

    plain = fk.SelfEvolution(lam=LAM.reshape(shape), beta=0.25, gamma=GAMMA.reshape(shape))
    strided = GAMMA.reshape(shape).T.contiguous().T
    assert strided.stride() != GAMMA.reshape(shape).stride()
    mixed = fk.SelfEvolution(lam=LAM.reshape(shape).double(), beta=torch.tensor(0.25).bfloat16(), gamma=strided)
    first, second = run(plain, T.reshape(shape)), run(mixed, T.reshape(shape).double())
    assert all(relative(a, b) < 1e-6 for a, b in zip(first, second, strict=True))
    zero_d, number = run(fk.NoEvo(lam=torch.tensor(0.5)), torch.tensor(2.0)), run(fk.NoEvo(lam=0.5), 2.0)
    assert all(relative(a, b) < 1e-6 for a, b in zip(zero_d, number, strict=True))
    if not shift:
        labels = p.labels
    else:
        labels = torch.cat([p.labels.reshape(shape)[:, 1:], torch.full((3, 1), -100)], 1).reshape(-1)
    own = fk.SelfEvolution(lam=LAM, beta=0.25, gamma=GAMMA)
    assert relative(first[0].reshape(-1), loop(p, own, T, labels)) < 3e-6


def test_they_are_constants():
    p = problem(N, V=101)
    lam, weight, temperature = (x.clone().requires_grad_() for x in (LAM, WEIGHT, T))
    objective = weight * fk.NoEvo(lam=lam)
    loss = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=temperature).loss
    loss.backward()
    assert lam.grad is weight.grad is temperature.grad is None and p.hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("number", [LAM[:-1], LAM[:, None], LAM.reshape(3, 6), LAM[None]], ids=lambda x: str(x.shape))
def test_other_shapes_are_refused(number):
    p = problem(N, V=101)
    for objective, temperature in (
        (fk.NoEvo(lam=number), 1.0),
        (number * fk.SFT(), 1.0),
        (fk.NoEvo(), number + 0.5),
    ):
        with pytest.raises(ValueError, match=rf"the labels' shape \({N},\), got a tensor of shape \({number.shape[0]}"):
            fk.kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=temperature)


def test_a_share_of_all_tokens_is_one_number():
    with pytest.raises(TypeError, match=r"fraction must be one number in \[0, 1\] for all tokens, got tensor"):
        fk.SelfEvolutionTopK(fraction=LAM)


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e13, float("nan")])
def test_temperatures_out_of_range(bad):
    temperature = T.clone()
    temperature[3] = bad
    with pytest.raises(ValueError, match=r"temperature must be in \[1e-08, 1e\+12\], got .* in a tensor"):
        fk.KDLoss(fk.NoEvo(), temperature=temperature)


def test_a_loss_may_go_from_numbers_to_tensors_and_back():
    p = problem(N, V=101)
    criterion = fk.KDLoss(fk.NoEvo(lam=0.5), reduction="none", backend="torch")
    plain = criterion(p.student(), p.teacher(), p.labels)
    criterion.objective = fk.NoEvo(lam=LAM)
    each = criterion(p.student(), p.teacher(), p.labels)
    assert relative(each, loop(p, fk.NoEvo(lam=LAM), 1.0, p.labels)) < 3e-6 and not torch.equal(plain, each)
    criterion.temperature = T
    assert relative(criterion(p.student(), p.teacher(), p.labels), loop(p, fk.NoEvo(lam=LAM), T, p.labels)) < 3e-6
    criterion.temperature, criterion.objective = 1.0, fk.NoEvo(lam=0.5)
    assert torch.equal(criterion(p.student(), p.teacher(), p.labels), plain)
    assert "temperature=tensor" in repr(fk.KDLoss(fk.NoEvo(), temperature=T))


def test_nothing_recompiles_between_values():
    """One graph for changing tensors, made outside of a step that is compiled whole."""
    p = problem(N, V=53)
    counter = CompileCounterWithBackend("aot_eager")
    criterion = fk.KDLoss(LAM * fk.SelfEvolution(lam=LAM, gamma=GAMMA) + 0.5 * fk.SFT(), temperature=T, backend="torch")

    def step(hidden, weight):
        return criterion(fk.LMHead(hidden, weight), p.teacher(), p.labels)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for by in (1.0, 0.9, 0.5):
        criterion.objective = WEIGHT * fk.SelfEvolution(lam=by * LAM, gamma=by * GAMMA) + 0.5 * fk.SFT()
        criterion.temperature = by * T
        given = (p.hidden, p.weight)
        assert relative(compiled(*given), step(*given)) < 1e-6
        assert furthest(gradients(compiled(*given), p.leaves), gradients(step(*given), p.leaves)) < 1e-6
    assert counter.frame_count == 1


def test_annealing_a_sum_writes_its_buffer_in_place():
    p = problem(N, V=101)
    criterion = fk.KDLoss(0.9 * fk.SFT() + 0.1 * fk.SelfEvolution(gamma=5.0), backend="torch")
    buffer, before = criterion.scalars, criterion.scalars.data_ptr()
    for share in (0.5, 0.0):
        objective = share * fk.SFT() + (1 - share) * fk.SelfEvolution(gamma=share, beta=0.7, floor=0.1)
        criterion.objective = objective
        assert criterion.scalars is buffer and buffer.data_ptr() == before
        assert torch.equal(buffer, torch.tensor([objective.scalars()]))
        expected = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, backend="torch").loss
        assert torch.equal(criterion(p.student(), p.teacher(), p.labels), expected)
    for other in (fk.SFT(), fk.SelfEvolution() + fk.SFT(), fk.SFT() + fk.SelfEvolution() + fk.SFT()):
        with pytest.raises(TypeError, match=r"objective must stay a SFT \+ SelfEvolution, got"):
            criterion.objective = other
