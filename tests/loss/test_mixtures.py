"""Mixtures of teachers with logits, lists and maps among them, against the oracle by hand, in every way of a loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.engines.problem import Problem as Call
from fused_kd.engines.problem import Side, Wanted
from fused_kd.ops import pack
from fused_kd.reference import reference_kd_loss

from ..kernels.contract import HOSTED, KINDS, cases, slow
from ..problems import CPU_BACKENDS, NAMES, OBJECTIVES, Problem, furthest, gradients, label, problem, relative
from .mixed import TIGHT, by_hand, compare, target, teacher_of

CHOSEN = [
    fk.SelfEvolution(gamma=2.0), fk.ForwardKD(lam=0.3), fk.GeneralizedJSD(0.3), fk.ReverseKD(lam=0.6),
    fk.TotalVariation(), fk.SelfEvolutionTopK(fraction=0.3),
]  # fmt: skip
TEACHERS = [
    pytest.param(kinds, id="+".join(kinds).replace(" ", "_"))
    for kinds in (
        ("head", "capped"), ("head", "logits"), ("capped", "bf16 logits", "head"), ("head", "uniform"),
        ("renormalize", "logits"), ("map", "head"), ("logits", "uniform map"),
    )
]  # fmt: skip
HOW = ("equal", "numbers", "tokens", "which")


def spoilt(teacher: Any, tokens: Tensor) -> Any:
    """With NaN, and ids that are none, at ``tokens`` (N,) bool, where nobody may look."""

    def nan(x: Tensor) -> Tensor:
        return x.masked_fill(tokens.unsqueeze(-1), math.nan)

    if isinstance(teacher, Tensor):
        return nan(teacher)
    if isinstance(teacher, fk.TopK):
        ids = teacher.indices.masked_fill(tokens.unsqueeze(-1), -7)
        rest = None if teacher.log_rest is None else teacher.log_rest.masked_fill(tokens, math.nan)
        return replace(teacher, log_probs=nan(teacher.log_probs), indices=ids, log_rest=rest)
    return replace(teacher, hidden=nan(teacher.hidden))


def mixed(p: Problem, kinds: tuple[str, ...], how: str) -> tuple[list[Any], dict[str, Any]]:
    """Teachers, and their shares; of those of each token, a third are 0, where the teacher holds NaN."""
    teachers = [teacher_of(kind, p, seed) for seed, kind in enumerate(kinds)]
    N, count, g = len(p.labels), len(kinds), torch.Generator().manual_seed(5)
    if how == "equal":
        return teachers, {}
    if how == "numbers":
        return teachers, {"weights": [0.1, 0.6, 0.3] if count == 3 else [0.2, 0.8]}
    if how == "which":
        which = torch.randint(count, (N,), generator=g)
        return [spoilt(teacher, which != i) for i, teacher in enumerate(teachers)], {"which": which}
    each = torch.rand(N, count, generator=g)
    each[torch.arange(N), torch.arange(N) % count] *= (torch.arange(N) % 3 > 0).float()
    buckets = [i for i, kind in enumerate(kinds) if kind.startswith("bucket")]
    if buckets:  # one of them must have a part of each token
        each[(each[:, buckets] == 0).all(1), buckets[0]] = 0.5
    each = each / each.sum(1, keepdim=True)
    weights = list(each.unbind(1))
    teachers = [spoilt(teacher, weight == 0) for teacher, weight in zip(teachers, weights, strict=True)]
    return teachers, {"weights": weights}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, where a teacher holds NaN
@pytest.mark.parametrize("kinds, how, backend", cases(TEACHERS, HOW, backends=HOSTED))
def test_equals_the_oracle(kinds: tuple[str, ...], how: str, backend: str) -> None:
    p = problem(N=5 if slow(backend) else 17, V=67 if slow(backend) else 101)
    teachers, shared = mixed(p, kinds, how)
    for objective in CHOSEN[: 1 if slow(backend) else None]:
        if (
            how in ("tokens", "which")
            and {"map", "renormalize"} & {*kinds}
            and any(term.of.everywhere for term in objective.spec.terms)
        ):
            continue  # infinite at tokens that have the list alone
        compare(p, teachers, objective, backend=backend, reference=backend == "torch", **shared)


EVERY = [
    pytest.param(x, marks=() if name in (*KINDS, "self_evolution_top_k", "sum_of_targets") else pytest.mark.exhaustive)
    for name, x in zip(NAMES, OBJECTIVES, strict=True)
    if x.spec.needs_teacher
]


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("objective", EVERY, ids=label)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_every_objective(backend: str, objective: Any, T: float) -> None:
    p = problem(N=17, V=101)
    teachers, shared = mixed(p, ("head", "capped", "uniform"), "numbers")
    compare(p, teachers, objective, T=T, tight=2e-5, backend=backend, reference=False, **shared)


@pytest.mark.parametrize("how", ["numbers", "which"])
@pytest.mark.parametrize("T", [0.6, 3.0, "tokens"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_temperatures(backend: str, T: Any, how: str) -> None:
    """Each teacher is flattened, not the mixture."""
    p = problem(N=5 if slow(backend) else 17, V=101, std=3.0)
    at = torch.rand(len(p.labels)) * 2 + 0.5 if T == "tokens" else T
    teachers, shared = mixed(p, ("head", "uniform map", "uniform"), how)
    for objective in (fk.NoEvo(lam=0.6), fk.GeneralizedJSD(0.4))[: 1 if slow(backend) else None]:
        compare(p, teachers, objective, T=at, backend=backend, **shared)


def test_a_temperature_is_each_teachers_own() -> None:
    """``p`` at T is not the softmax of the mixture's logits at 1 over T."""
    p = problem(N=17, V=101, std=3.0, ignored=0.0)
    teachers = [teacher_of(kind, p) for kind in ("head", "logits")]
    flat = target(teachers, 101, torch.full((17, 2), 0.5), 3.0)
    other = (target(teachers, 101, torch.full((17, 2), 0.5)).log() / 3.0).softmax(-1)
    assert relative(flat, other) > 0.01
    loss = fk.kd_loss(p.student(), fk.Mixture(teachers), p.labels, fk.ForwardKD(lam=1), temperature=3.0).loss
    log_q = ((p.hidden.double() @ p.weight.double().T) / 3.0).log_softmax(-1)
    assert relative(loss, (flat * (flat.log() - log_q)).sum(-1).mean()) < TIGHT


@pytest.mark.parametrize("how", ["numbers", "which"])
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_low_precision(backend: str, dtype: torch.dtype, limit: float, how: str) -> None:
    """One rounding of the results."""
    p = problem(N=17, V=101, dtype=dtype, bias=True)
    teachers, shared = mixed(p, ("head", "bf16 logits", "capped"), how)
    for objective in (fk.SelfEvolution(gamma=2.0), fk.GeneralizedJSD(0.3)):
        compare(p, teachers, objective, rounding=limit, reference=False, backend=backend, **shared)


def test_autocast() -> None:
    p, rounded = problem(N=17, V=101), problem(N=17, V=101, dtype=torch.bfloat16)
    teachers, shared = mixed(p, ("head", "capped"), "numbers")
    with torch.autocast("cpu", torch.bfloat16):
        out = fk.kd_loss(p.student(), fk.Mixture(teachers, **shared), p.labels, fk.NoEvo())
        grads = gradients(out.loss, p.leaves)
    low, _ = mixed(rounded, ("head", "capped"), "numbers")
    ref = fk.kd_loss(rounded.student(), fk.Mixture(low, **shared), p.labels, fk.NoEvo())
    assert relative(out.loss, ref.loss) < 1e-6
    assert furthest(grads, gradients(ref.loss, rounded.leaves)) < 4e-3


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("objective", [fk.SelfEvolution(gamma=2.0), fk.SelfEvolutionTopK(fraction=0.3)], ids=label)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_chunks_reductions_and_a_second_backward(backend: str, objective: Any, how: str) -> None:
    """Chunks of a few tokens, token weights, any upstream gradient, and another backward of the same graph."""
    p = problem(N=37, V=101)
    teachers, shared = mixed(p, ("head", "logits", "uniform"), how)
    teacher, valid, up = fk.Mixture(teachers, **shared), p.labels != -100, torch.rand(37)
    losses, *_ = by_hand(p, teachers, objective, **shared)
    options: dict[str, Any] = {"backend": backend, "memory_budget": 30_000, "token_weights": up}
    each = fk.kd_loss(p.student(), teacher, p.labels, objective, reduction="none", **options).loss
    assert relative(each[valid], losses * up[valid]) < TIGHT and not each[~valid].any()
    refs = reference_kd_loss(p.student(), teacher, p.labels, objective, reduction="none", token_weights=up).loss
    whole = fk.kd_loss(p.student(), teacher, p.labels, objective, reduction="sum", **options).loss
    first = torch.autograd.grad(whole, p.leaves, retain_graph=True)
    again = torch.autograd.grad(whole, p.leaves, torch.tensor(-0.5))
    assert furthest(first, gradients(refs.sum(), p.leaves)) < TIGHT
    assert furthest(again, [-0.5 * x for x in first]) < 1e-6
    pulled = (
        torch.autograd.grad(x, p.leaves, up.to(x.dtype)) for x in (each, reference_kd_loss(
            p.student(), teacher, p.labels, objective, reduction="none", token_weights=up).loss)
    )  # fmt: skip
    assert furthest(*pulled) < TIGHT


@pytest.mark.parametrize("how", HOW)
def test_shift_and_a_batch_of_rows(how: str) -> None:
    """Weights and ``which`` are those of the predicting positions."""
    p = problem(N=24, V=101)
    teachers, shared = mixed(p, ("head", "capped"), how)
    flat = fk.Mixture(teachers, **shared)

    def rows(x: Any) -> Any:
        return x.reshape(3, 8, *x.shape[1:]) if isinstance(x, Tensor) and x.dim() else x

    labels = rows(p.labels)
    teachers = [replace(teacher, hidden=rows(teacher.hidden)) for teacher in teachers]
    named = {k: rows(v) if k == "which" else [rows(w) for w in v] for k, v in shared.items()}
    student = fk.LMHead(rows(p.hidden), p.weight)
    found = fk.kd_loss(student, fk.Mixture(teachers, **named), labels, fk.NoEvo(), shift=True)
    aligned = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    expected = fk.kd_loss(p.student(), flat, aligned.reshape(-1), fk.NoEvo())
    assert found.difficulty.shape == (3, 8)
    assert torch.equal(found.loss, expected.loss)
    assert furthest(gradients(found.loss, p.leaves), gradients(expected.loss, p.leaves)) < 1e-7
    ref = reference_kd_loss(student, fk.Mixture(teachers, **named), labels, fk.NoEvo(), shift=True)
    assert relative(found.loss, ref.loss) < TIGHT


def test_vocab_size_cuts_every_teacher() -> None:
    p = problem(N=17, V=101, ignored=0.0)
    p.labels %= 90
    wide, small = teacher_of("logits", p), teacher_of("capped", p)
    small = replace(small, weight=small.weight[:90], bias=small.bias[:90])
    pairs = [(0.4, wide), (0.6, small)]
    out, ref = (f(p.student(), pairs, p.labels, fk.NoEvo(), vocab_size=90) for f in (fk.kd_loss, reference_kd_loss))
    assert relative(out.loss, ref.loss) < TIGHT
    assert furthest(gradients(out.loss, p.leaves), gradients(ref.loss, p.leaves)) < TIGHT
    cut = replace(p, weight=p.weight[:90])
    assert relative(ref.loss, by_hand(cut, [wide[:, :90], small], fk.NoEvo(), weights=(0.4, 0.6))[0].mean()) < 1e-9


@pytest.mark.parametrize("chosen_by", ["teacher", "student"])
@pytest.mark.parametrize("how", ["numbers", "which"])
def test_lists_of_a_mixture(how: str, chosen_by: str) -> None:
    """Chosen from what is mixed, which is whole in each chunk; given logits are not written over."""
    p = problem(N=17, V=101)
    teachers, shared = mixed(p, ("logits", "head"), how)
    kept = teachers[0].clone()
    teacher = fk.Mixture(teachers, **shared)
    N = len(p.labels)
    own = (
        torch.tensor([0.2, 0.8]).expand(N, 2)
        if how == "numbers"
        else torch.stack([shared["which"] == i for i in (0, 1)], 1)
    )
    whole = target(teachers, 101, own.double()).log().float()
    for objective in (fk.NoEvo(lam=0.6), fk.ReverseKD(lam=1.0)):
        out, ref = (
            fk.kd_loss(p.student(), each, p.labels, objective, lists=fk.Lists(9, chosen_by), memory_budget=20_000)
            for each in (teacher, whole)
        )
        assert relative(out.loss, ref.loss) < TIGHT and relative(out.difficulty, ref.difficulty) < TIGHT
        assert furthest(gradients(out.loss, p.leaves), gradients(ref.loss, p.leaves)) < TIGHT
    assert torch.equal(teachers[0].nan_to_num(), kept.nan_to_num())


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_statistics_of_a_mixture(backend: str) -> None:
    p = problem(N=17, V=101)
    teachers, shared = mixed(p, ("head", "uniform"), "tokens")
    names = ("entropy_t", "kl", "log_p_y", "target_entropy", "top_1", "overlap", "log_sum_exp_s")
    told = fk.kd_loss(
        p.student(), fk.Mixture(teachers, **shared), p.labels, fk.NoEvo(), statistics=names, backend=backend
    ).statistics
    whole = target(teachers, 101, torch.stack(shared["weights"], 1).double()).log().float()
    refs = fk.kd_loss(p.student(), whole, p.labels, fk.NoEvo(), statistics=names, backend="torch").statistics
    for name in names:
        assert relative(told[name], refs[name]) < TIGHT, name


def test_what_a_mixture_is_no_more_than() -> None:
    """One teacher; all weight on the first; the same one twice; each token's own as a batch of its own."""
    p = problem(N=17, V=101)
    head, other, y = p.teacher(), teacher_of("capped", p), p.labels
    alone = fk.kd_loss(p.student(), head, y, fk.SelfEvolution(gamma=2.0))
    grads = gradients(alone.loss, p.leaves)
    for teacher in (
        [(1.0, head)], fk.Mixture([head]), [(1.0, head), (0.0, other)], [(0.3, head), (0.7, head)],
        fk.Mixture([other, head], which=torch.ones(17, dtype=torch.int32)),
        [(torch.ones(17), head), (torch.zeros(()), spoilt(other, y > -200))],
    ):  # fmt: skip
        out = fk.kd_loss(p.student(), teacher, y, fk.SelfEvolution(gamma=2.0))
        assert relative(out.loss, alone.loss) < 1e-6 and torch.equal(out.is_hard, alone.is_hard)
        assert furthest(gradients(out.loss, p.leaves), grads) < 1e-6
    which = torch.arange(17) % 2
    found = fk.kd_loss(p.student(), fk.Mixture([head, other], which=which), y, fk.NoEvo(), reduction="none").loss
    for i, teacher in enumerate((head, other)):
        own = fk.kd_loss(p.student(), teacher, y, fk.NoEvo(), reduction="none").loss
        assert relative(found[which == i], own[which == i]) < 1e-6


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_runs_of_one_teacher(backend: str) -> None:
    """Chunks that are all of one, of another, and of both; without ignored tokens, whose places are a slice."""
    p = problem(N=40, V=101, ignored=0.0)
    which = torch.tensor([0] * 17 + [1] * 13 + [2] * 10)
    teachers = [spoilt(teacher_of(kind, p, i), which != i) for i, kind in enumerate(("head", "logits", "uniform"))]
    for objective in CHOSEN:
        compare(p, teachers, objective, which=which, backend=backend, memory_budget=12_000)


def test_without_a_teacher_nothing_is_mixed() -> None:
    p = problem(N=17, V=101)
    teacher = fk.Mixture([p.teacher(), teacher_of("bucket", p)], which=torch.full((17,), 9))
    assert torch.equal(
        fk.kd_loss(p.student(), teacher, p.labels, fk.SFT()).loss,
        fk.kd_loss(p.student(), None, p.labels, fk.SFT()).loss,
    )


@pytest.mark.parametrize("how", ["numbers", "which"])
def test_excluded_tokens(how: str) -> None:
    """p is 0 where all with a part exclude the token: KL(q||p) is infinite; KL(p||q) is not."""
    p = problem(N=9, V=31, ignored=0.0)
    teachers = [teacher_of("logits", p, i) for i in range(2)]
    teachers[0][:, :9], teachers[1][:, 5:20] = -math.inf, -math.inf
    shared: dict[str, Any] = {"weights": [0.4, 0.6]} if how == "numbers" else {"which": torch.arange(9) % 2}
    compare(p, teachers, fk.ForwardKD(lam=1.0), reference=False, **shared)
    compare(p, teachers, fk.TotalVariation(), **shared)
    loss = fk.kd_loss(p.student(), fk.Mixture(teachers, **shared), p.labels, fk.ReverseKD(lam=1.0)).loss
    assert loss == math.inf


@pytest.mark.parametrize(
    "kinds, how",
    [
        (("head", "uniform"), "tokens"),
        (("head", "capped"), "which"),
        (("uniform", "renormalize"), "numbers"),
        (("bucket:60", "logits"), "tokens"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, tuple) else x,
)
def test_compiles_whole(kinds: tuple[str, ...], how: str) -> None:
    """Dense, and what is a list."""
    p = problem(N=17, V=101)
    teachers, shared = mixed(p, kinds, how)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return fk.kd_loss(fk.LMHead(hidden, weight), fk.Mixture(teachers, **shared), p.labels, fk.NoEvo()).loss

    torch.compiler.reset()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(p.hidden, p.weight)
    plain = step(p.hidden, p.weight)
    assert relative(loss, plain) < 1e-6
    assert furthest(gradients(loss, p.leaves), gradients(plain, p.leaves)) < 1e-6


@pytest.mark.parametrize("how", ["shares", "which"])
def test_opcheck(how: str) -> None:
    p = problem(N=7, V=31)
    listed = teacher_of("uniform", p)
    call = Call(
        student=Side(p.hidden.detach(), p.weight.detach()), teacher=Side(p.hidden_t, p.weight_t), labels=p.labels,
        weights=None, scale=torch.ones(()), scalars=torch.tensor([fk.NoEvo().scalars()]),
        wanted=Wanted(True, True, False), spec_code=fk.NoEvo().spec.code, cold_labels=False, vocab=31, dtype=None,
        memory_budget=None, engine="chunked", backend="torch",
        others=(
            Side(teacher_of("logits", p)),
            Side(listed.log_probs, indices=listed.indices, tail="uniform", log_rest=listed.log_rest),
        ),
        shares=torch.tensor([[0.2, 0.3, 0.5]]).log() if how == "shares" else None,
        which=torch.arange(7) % 3 if how == "which" else None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fused_kd.kd.default, pack(call))
