"""Numbers that are tensors: each token's loss is that of its own numbers, whatever is done around it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_kd as fk
from fused_kd import checks
from fused_kd import objectives as o
from fused_kd.objectives import base
from fused_kd.reference import reference_kd_loss

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
    """Copies, and refused where somebody waits for a gradient."""
    p = problem(N, V=101)
    lam, weight, temperature = LAM.clone(), WEIGHT.clone(), T.clone()
    criterion = fk.KDLoss(weight * fk.NoEvo(lam=lam), temperature=temperature)
    before = criterion(p.student(), p.teacher(), p.labels)
    for number in (lam, weight, temperature):
        number.fill_(7.0)
    assert torch.equal(criterion(p.student(), p.teacher(), p.labels), before)
    learnt = LAM.clone().requires_grad_()
    for name, make in (
        ("lam", lambda: fk.NoEvo(lam=learnt)),
        ("weight", lambda: learnt * fk.SFT()),
        ("weight", lambda: fk.SFT() * torch.nn.Parameter(torch.tensor(0.5))),
        ("temperature", lambda: fk.KDLoss(fk.SFT(), temperature=learnt)),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a constant, got a tensor that requires grad; detach it"):
            make()


HALVES = [
    o.Renyi, o.SkewForward, o.SkewReverse, o.SkewReverseDetached, o.GeneralizedJSD, o.SymmetricKL, o.NoEvo, o.ForwardKD,
    o.SkewTeacher,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", HALVES, ids=lambda cls: cls.name)
def test_numbers_of_16_bits_are_what_they_say(cls, dtype):
    """1 - x of such an x is none of 16 bits; nor is a product of two."""
    p = problem(N, V=101)
    half = torch.linspace(0.013, 0.97, N).to(dtype)
    name = "lam" if cls in (o.NoEvo, o.ForwardKD) else "alpha" if hasattr(cls, "alpha") else "beta"

    def run(x):
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, 0.3 * (x * cls(**{name: x})), backend="torch")
        return out.loss, *gradients(out.loss, p.leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(half), run(half.double()), strict=True))


UNSEEN = {
    "weight": lambda: (torch.tensor(-1.0) * fk.SFT(), 1.0),
    "large weight": lambda: (torch.full((N,), 1e13) * fk.NoEvo(), 1.0),
    "temperature": lambda: (fk.NoEvo(), torch.full((N,), -1.0)),
    "small temperature": lambda: (fk.NoEvo(), torch.tensor(1e-9)),
    "beta": lambda: (o.SymmetricKL(beta=torch.full((N,), 2.0)), 1.0),
    "order": lambda: (o.Renyi(alpha=torch.zeros(N)), 1.0),
    "exponent": lambda: (o.AlphaBeta(alpha=torch.full((N,), 1e-6)), 1.0),
    "share": lambda: (o.SkewReverse(alpha=torch.zeros(N)), 1.0),
    "tau": lambda: (o.EntropyGated(tau=torch.full((N,), -1.0)), 1.0),
    "NaN": lambda: (fk.SFT() + fk.SelfEvolution(gamma=torch.full((N,), float("nan"))), 1.0),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_what_is_not_looked_at_makes_nan(case, monkeypatch):
    """As on an accelerator, where looking would wait for it."""
    p = problem(N, V=101)
    for module in (checks, base):
        monkeypatch.setattr(module, "is_looked_at", lambda value: False)
    objective, temperature = UNSEEN[case]()
    out = fk.kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=temperature, reduction="none")
    assert torch.equal(out.loss.isnan(), p.labels != -100)
    fine = fk.kd_loss(p.student(), p.teacher(), p.labels, WEIGHT * fk.NoEvo(lam=LAM), temperature=T)
    assert fine.loss.isfinite()


@pytest.mark.parametrize("number", [LAM[:-1], LAM[:, None], LAM.reshape(3, 6), LAM[None]], ids=lambda x: str(x.shape))
def test_other_shapes_are_refused(number):
    p = problem(N, V=101)
    for name, objective, temperature in (
        ("lam", fk.NoEvo(lam=number), 1.0),
        ("weight", number * fk.SFT(), 1.0),
        ("temperature", fk.NoEvo(), number + 0.5),
    ):
        shape = ", ".join(map(str, number.shape))
        message = rf"{name} must be 0-d or have the labels' shape \({N},\), or 1 in places of it, got .* \({shape}"
        with pytest.raises(ValueError, match=message):
            fk.kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=temperature)


def test_a_number_of_each_sequence():
    p, alpha = problem(N, V=101), LAM[:3, None]
    sequences = [x.reshape(3, 6, -1) for x in (p.hidden, p.hidden_t)]
    student, teacher = fk.LMHead(sequences[0], p.weight), fk.LMHead(sequences[1], p.weight_t)
    options = {"reduction": "none", "backend": "torch"}
    labels, T_of_places = p.labels.reshape(3, 6), 1.0 + LAM[:6][None]
    spread = fk.SkewForward(alpha=alpha.expand(3, 6))
    found = fk.kd_loss(student, teacher, labels, fk.SkewForward(alpha=alpha), temperature=T_of_places, **options)
    expected = fk.kd_loss(student, teacher, labels, spread, temperature=T_of_places.expand(3, 6), **options)
    assert torch.equal(found.loss, expected.loss)
    reference = reference_kd_loss(
        student, teacher, labels, 0.5 * fk.SkewForward(alpha=alpha) + alpha * fk.SFT(), temperature=T_of_places
    )
    mine = fk.kd_loss(
        student, teacher, labels, 0.5 * fk.SkewForward(alpha=alpha) + alpha * fk.SFT(), temperature=T_of_places
    )
    assert relative(mine.loss, reference.loss) < 1e-6


def test_the_reference_takes_them_beside_ignored_tokens():
    p = problem(N, V=101, ignored=0.4)
    objective = WEIGHT * fk.SFT() + fk.SelfEvolution(lam=LAM, beta=BETA, gamma=GAMMA)
    mine, truth = (
        call(p.student(), p.teacher(), p.labels, objective, temperature=T, reduction="none")
        for call in (fk.kd_loss, reference_kd_loss)
    )
    assert relative(mine.loss, truth.loss) < 3e-6 and torch.equal(mine.is_hard, truth.is_hard)


def test_no_tokens_have_no_numbers():
    z, labels = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    for objective in (fk.SelfEvolutionTopK(lam=torch.zeros(0)), torch.zeros(0) * fk.SFT() + fk.NoEvo()):
        assert fk.kd_loss(z, z, labels, objective).loss == 0.0


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


MADE_INSIDE = {
    "alpha": lambda x: (fk.SkewForward(alpha=x), 1.0),
    # torch.compile takes a product with a tensor for a tensor
    "weight": lambda x: (o.Sum(((x, fk.SFT()), (1 - x, fk.NoEvo()))), 1.0),
    "tau": lambda x: (o.EntropyGated(tau=x), 1.0),
    "temperature": lambda x: (fk.ForwardKD(), 1.0 + x),
}


@pytest.mark.parametrize("case", MADE_INSIDE)
def test_tensors_made_inside_of_a_compiled_step(case):
    """Not looked at there: out of range is NaN."""
    p = problem(N, V=53)

    def step(x):
        objective, temperature = MADE_INSIDE[case](x)
        return fk.kd_loss(p.student(), p.teacher(), p.labels, objective, temperature=temperature, backend="torch").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert relative(compiled(LAM), step(LAM)) < 1e-6
    assert compiled(torch.full((N,), -3.0)).isnan()


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
        with pytest.raises(TypeError, match=r"objective must stay a SFT \+ SelfEvolution, in this order, got"):
            criterion.objective = other
