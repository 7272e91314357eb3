"""Mixtures: what a call holds of memory, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_kd as fk
from fused_kd.engines import chunked, chunks, gemm, head_gradient
from fused_kd.engines.plan import Plan

from ..problems import CPU_BACKENDS, Allocations, Problem, needs_compiler, problem
from .mixed import teacher_of

HELD = [
    ("head",), ("head", "capped"), ("head", "capped", "head", "capped"), ("head", "logits", "bf16 logits"),
    ("head", "uniform:100"), ("uniform map", "head"),
]  # fmt: skip
# of the C row, a thread's own
ROWS_OWN = 70_000


def planned(p: Problem, teacher: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Plan, Allocations]:
    plans, plan_chunks = [], chunked.plan_chunks
    monkeypatch.setattr(chunked, "plan_chunks", lambda *a, **k: plans.append(plan_chunks(*a, **k)) or plans[-1])
    with Allocations() as seen:
        fk.kd_loss(p.student(), teacher, p.labels, fk.NoEvo(), **options)
    return plans[0], seen


@needs_compiler
@pytest.mark.parametrize("how", ["numbers", "which"])
@pytest.mark.parametrize("budget", [None, 400_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kinds", HELD, ids="+".join)
def test_held_is_what_the_plan_says(
    kinds: tuple[str, ...], dtype: torch.dtype, budget: int | None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (gemm, chunks, head_gradient):
        monkeypatch.setattr(module, "SLAB_BYTES", 1 << 14)
    p = problem(N=64, V=2000, dtype=dtype)
    teachers = [teacher_of(kind, p, i) for i, kind in enumerate(kinds)]
    which = torch.arange(64) % len(kinds) if how == "which" else None
    fk.kd_loss(p.student(), fk.Mixture(teachers), p.labels, fk.NoEvo())  # a map is looked at once
    budget = None if budget is None else budget + (4 * p.weight.numel() if dtype == torch.bfloat16 else 0)
    plan, seen = planned(p, fk.Mixture(teachers, which=which), monkeypatch, memory_budget=budget, backend="native")
    results = p.hidden.nbytes + p.weight.nbytes + 9 * 64
    assert budget is None or plan.chunk < 64
    assert plan.workspace / 4 < seen.peak - results <= plan.workspace + ROWS_OWN
    assert budget is None or seen.largest < 64 * 2000 * 4 or p.weight.nbytes >= seen.largest


def test_further_teachers_take_no_further_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of a chunk's logits, whether they are two or five; more tokens, more chunks."""
    p = problem(N=64, V=2000)
    plans = [
        planned(p, fk.Mixture([p.teacher()] * count), monkeypatch, backend="torch", memory_budget=300_000)
        for count in (2, 5)
    ]
    (two, seen_two), (five, seen_five) = plans
    per_token = (five.workspace - two.workspace * five.chunk / two.chunk) / five.chunk
    assert per_token == pytest.approx(3 * 8 * 40)  # the hidden states
    assert seen_five.largest <= max(seen_two.largest, p.weight.nbytes)
    assert max(seen_two.largest, seen_five.largest) < 64 * 2000 * 4


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_a_bucket_holds_no_logits_of_all_tokens(backend: str) -> None:
    """The dense teacher is read at the list's entries, in pieces."""
    p = problem(N=400, V=3000, ignored=0.0)
    teacher = [(0.5, teacher_of("bucket:20", p)), (0.5, p.teacher())]
    with Allocations() as seen:
        fk.kd_loss(p.student(), teacher, p.labels, fk.NoEvo(), memory_budget=1 << 20, backend=backend)
    assert seen.largest < 400 * 3000 * 4 / 2


P = problem(N=6, V=50, ignored=0.0)
HEAD, LOGITS = P.teacher(), torch.randn(6, 50)
BUCKET, UNIFORM, RENORMALIZE, LISTED = (teacher_of(f"{t}:8", P) for t in ("bucket", "uniform", "renormalize", "listed"))
MAPPED = {
    tail: fk.LMHead(torch.randn(6, 4), torch.randn(60, 4), columns=torch.arange(50), tail=tail)
    for tail in ("renormalize", "bucket", "listed")
}
GRAD = torch.full((6,), 0.5, requires_grad=True)


def call(teacher: Any, objective: Any = None, **options: Any) -> Any:
    return fk.kd_loss(P.student(), teacher, P.labels, objective or fk.NoEvo(), **options)


def mix(teachers: Any, weights: Any = None, which: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: call(fk.Mixture(teachers, weights, which), **options)


def pairs(*given: Any, **options: Any) -> Callable[[], Any]:
    return lambda: call(list(given), **options)


BOTH = [HEAD, LOGITS]
SHORT = torch.full((5,), 0.5)
WRONG = torch.tensor([0.5, 0.5, 0.7, 0.5, 0.5, 0.5])
WHICH = torch.zeros(6, dtype=torch.int64)
TENSOR = torch.ones(6)
COLD = fk.top_k_of(HEAD, 8, temperature=2.0)
MESSAGES: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "teachers must be a sequence of teachers, got LMHead", mix(HEAD)),
    (TypeError, "teachers must be a sequence of teachers, got Tensor", mix(LOGITS)),
    (TypeError, "teachers must be a sequence of teachers, got generator", mix(x for x in BOTH)),
    (ValueError, "teachers must hold at least one teacher, got none", mix([])),
    (TypeError, "teachers[1] must be an LMHead or a tensor of logits, got str", mix([HEAD, "model"])),
    (TypeError, "teachers[1] must be an LMHead or a tensor of logits, got Mixture", mix([HEAD, fk.Mixture(BOTH)])),
    (TypeError, "teachers[0] must be float32, bfloat16 or float16, got torch.float64", mix([LOGITS.double(), HEAD])),
    (ValueError, "teachers[1] must have the tail 'renormalize', 'uniform' or 'bucket' in a mixture, got 'listed'",
     mix([HEAD, LISTED])),
    (ValueError, "teachers[0] must have the tail 'renormalize' or 'uniform' in a mixture, got columns with 'bucket'",
     mix([MAPPED["bucket"], HEAD])),
    (ValueError, "got columns with 'listed', whose categories the others do not have", mix([HEAD, MAPPED["listed"]])),
    (TypeError, "weights must be a sequence, one for each teacher, got Tensor", mix(BOTH, torch.tensor([0.5, 0.5]))),
    (TypeError, "weights must be a sequence, one for each teacher, got float", mix(BOTH, 0.5)),
    (ValueError, "weights must be as many as teachers, 2, got 3", mix(BOTH, [0.2, 0.3, 0.5])),
    (ValueError, "weights[0] must be at least 0, got -0.5", mix(BOTH, [-0.5, 1.5])),
    (ValueError, "weights[1] must be at least 0, got nan", mix(BOTH, [1.0, math.nan])),
    (ValueError, "weights[1] must be at least 0, got inf", mix(BOTH, [1.0, math.inf])),
    (TypeError, "weights[0] must be a number or a floating-point tensor, got True", mix(BOTH, [True, 0.0])),
    (TypeError, "weights[1] must be a number or a floating-point tensor, got '0.5'", mix(BOTH, [0.5, "0.5"])),
    (TypeError, "weights[0] must be a number or a floating-point tensor, got one of", mix(BOTH, [WHICH, 1.0])),
    (ValueError, "weights[1] must be a constant, got a tensor that requires grad; detach it", mix(BOTH, [0.5, GRAD])),
    (ValueError, "weights must add up to 1, got [0.5, 0.6], which add up to 1.1", mix(BOTH, [0.5, 0.6])),
    (ValueError, "weights must be at least 0 and add up to 1, got [0.699999988079071, 0.5] at token 2",
     mix(BOTH, [WRONG, 0.5])),
    (ValueError, "weights must be at least 0 and add up to 1, got [-1.0, 2.0] at token 0",
     mix(BOTH, [-TENSOR, 2 * TENSOR])),
    (ValueError, "weights must be at least 0 and add up to 1", mix([UNIFORM, RENORMALIZE], [WRONG, 0.5])),
    (ValueError, "weights must be at least 0 and add up to 1", mix([HEAD], [WRONG])),
    (ValueError, "weights[1] must have the labels' shape (6,), got (5,)", mix(BOTH, [0.5, SHORT])),
    (ValueError, "weights[0] must have the labels' shape (6,), got (5,)", mix([BUCKET, HEAD], [SHORT, 0.5])),
    (ValueError, "weights must be None with which, whose teacher is a token's only one", mix(BOTH, [0.5, 0.5], WHICH)),
    (TypeError, "which must be an int64 or int32 tensor, got torch.float32", mix(BOTH, which=TENSOR)),
    (TypeError, "which must be an int64 or int32 tensor, got list", mix(BOTH, which=[0, 1])),
    (ValueError, "which must have the labels' shape (6,), got (5,)", mix(BOTH, which=WHICH[:5])),
    (ValueError, "which must have the labels' shape (6,), got ()", mix(BOTH, which=WHICH[0])),
    (ValueError, "which must be in [0, 2), got 2", mix(BOTH, which=WHICH + 2)),
    (ValueError, "which must be in [0, 2), got -1", mix(BOTH, which=WHICH - 1)),
    (ValueError, "which must be in [0, 2), got 3", mix([UNIFORM, RENORMALIZE], which=WHICH + 3)),
    (ValueError, "which must be in [0, 2), got 3", mix([BUCKET, BUCKET], which=WHICH + 3)),
    (ValueError, "which must be in [0, 1), got 1", mix([HEAD], which=WHICH + 1)),
    (ValueError, "which must choose among lists that all have the tail 'bucket', or", mix([BUCKET, HEAD], which=WHICH)),
    (ValueError, "which must choose among lists that all have the tail 'bucket'", mix([UNIFORM, BUCKET], which=WHICH)),
    (ValueError, "teachers[1] must have no columns in a mixture with a list whose tail is 'bucket'",
     mix([BUCKET, MAPPED["renormalize"]])),
    (ValueError, "columns must have the student's 50 entries, got 49",
     mix([HEAD, fk.LMHead(torch.randn(6, 4), torch.randn(60, 4), columns=torch.arange(49))])),
    (ValueError, "teachers[1] must hold the student's tokens, shape (6,), got (5,)", mix([HEAD, LOGITS[:5]])),
    (ValueError, "teachers[1] must hold the student's tokens, shape (6,), got (5,)", mix([BUCKET, LOGITS[:5]])),
    (ValueError, "have unequal vocabularies, 50 and 49", mix([HEAD, LOGITS[:, :49]])),
    (ValueError, "temperature must be a number with a mixture that is a list, got a tensor",
     mix([UNIFORM, RENORMALIZE], temperature=TENSOR)),
    (ValueError, "temperature must be 1 with tail='bucket'", mix([BUCKET, HEAD], temperature=TENSOR)),
    (ValueError, "temperature must be 1 with tail='bucket'", mix([BUCKET, HEAD], temperature=2.0)),
    (ValueError, "temperature must be 2 with tail='bucket'", mix([HEAD, COLD])),
    (ValueError, "tail must be 'uniform'", mix([BUCKET, HEAD], objective=fk.NoEvo() + fk.objectives.ZLoss())),
    (ValueError, "which is infinite where the teacher is 0, got 'renormalize'",
     mix([RENORMALIZE, RENORMALIZE], objective=fk.ReverseKD(lam=1.0))),
    (ValueError, "engine='streaming' mixes no teachers; use engine='chunked'", mix(BOTH, engine="streaming")),
    (ValueError, "lists must be None with a TopK", mix([HEAD, UNIFORM], lists=fk.Lists(3))),
    (ValueError, "lists must be None with columns", mix([HEAD, MAPPED["renormalize"]], lists=fk.Lists(3))),
    (ValueError, "statistics must be empty with a TopK", mix([UNIFORM, UNIFORM], statistics=("kl",))),
    (TypeError, "or a list of (weight, teacher), got a list of 2", pairs(HEAD, LOGITS)),
    (TypeError, "or a list of (weight, teacher), got a list of 0", pairs()),
    (TypeError, "or a list of (weight, teacher), got a list of 1", pairs((0.5, HEAD, LOGITS))),
    (TypeError, "teachers[0] must be an LMHead or a tensor of logits, got float", pairs((HEAD, 0.5), (LOGITS, 0.5))),
    (ValueError, "weights must add up to 1, got [0.5, 0.4]", pairs((0.5, HEAD), (0.4, LOGITS))),
    (ValueError, "got nan at token 4",
     mix([UNIFORM, fk.TopK(torch.where(torch.arange(6)[:, None] == 4, math.nan, -9.0).expand(6, 2),
                           torch.tensor([[0, 1]] * 6), "uniform")])),
    (ValueError, "indices of a token must differ, got 3 twice",
     mix([HEAD, fk.TopK(torch.full((6, 2), -3.0), torch.full((6, 2), 3), "uniform")])),
]  # fmt: skip


@pytest.mark.parametrize("kind, message, bad", MESSAGES, ids=[f"{i}-{m[:60]}" for i, (_, m, _) in enumerate(MESSAGES)])
def test_messages(kind: type[Exception], message: str, bad: Callable[[], Any]) -> None:
    with pytest.raises(kind) as error:
        bad()
    assert message in str(error.value)


def test_a_map_beside_others_is_not_refused_for_what_it_lacks() -> None:
    """KL(q||p) is finite where another teacher has what a map has not; where nobody has it, it is infinite."""
    columns = torch.arange(50)
    columns[7] = -1
    head = fk.LMHead(torch.randn(6, 4), torch.randn(60, 4), columns=columns)
    with pytest.raises(ValueError, match="which is infinite where the teacher is 0"):
        call(head, fk.ReverseKD(lam=1.0))
    assert call([(0.5, head), (0.5, HEAD)], fk.ReverseKD(lam=1.0)).loss.isfinite()
    assert call([(0.5, head), (0.5, head)], fk.ReverseKD(lam=1.0)).loss == math.inf


def test_what_is_ignored_may_hold_anything() -> None:
    """Weights, which and lists of ignored tokens are not looked at."""
    labels = P.labels.clone()
    labels[2] = -100
    wild = torch.full((6,), 0.5)
    wild[2] = -7.0
    which = WHICH.clone()
    which[2] = 99
    for teachers in (BOTH, [UNIFORM, RENORMALIZE], [BUCKET, BUCKET]):
        for mixture in (fk.Mixture(teachers, [wild, torch.full((6,), 0.5)]), fk.Mixture(teachers, which=which)):
            assert fk.kd_loss(P.student(), mixture, labels, fk.NoEvo()).loss.isfinite()


def test_nothing_valid() -> None:
    for teachers in (BOTH, [UNIFORM, RENORMALIZE], [BUCKET, HEAD]):
        out = fk.kd_loss(P.student(), fk.Mixture(teachers), torch.full((6,), -100), fk.NoEvo())
        assert out.loss == 0 and not any(g.any() for g in torch.autograd.grad(out.loss, P.leaves))
