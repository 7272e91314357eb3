"""Lists that a loss chooses while it runs: equal to a TopK made by hand from full logits in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_kd as fk
from fused_kd.inputs import TAILS
from fused_kd.reference import full_logits, reference_kd_loss

from ..kernels.contract import HOSTED, cases, slow
from ..problems import JUMPS, Allocations, Problem, gradients, problem, relative, summands

TIGHT = 8e-6
OBJECTIVES = [
    fk.NoEvo(lam=0.6), fk.ForwardKD(lam=0.4), fk.SelfEvolution(gamma=2.0), fk.GeneralizedJSD(0.4),
    fk.ReverseKD(lam=1.0), fk.TotalVariation(), 0.5 * fk.SFT() + 0.5 * fk.SkewReverse(0.3),
]  # fmt: skip


class Exact(fk.TopK):
    """Of float64 tensors, which the library refuses and the oracle needs."""

    def __post_init__(self) -> None:
        pass


def by_hand(p: Problem, teacher: Any, lists: fk.Lists, T: float = 1.0) -> Exact:
    z, z_t = ((full_logits(side) / T).detach() for side in (p.student(), teacher))
    by = (z if lists.chosen_by == "student" else z_t).log_softmax(-1)
    values, ids = by.topk(min(lists.k, by.shape[-1]))
    before = values.exp().cumsum(-1) - values.exp()
    kept = before < (2.0 if lists.top_p is None else lists.top_p)
    log_p = z_t.log_softmax(-1)
    listed = log_p.gather(-1, ids).masked_fill(~kept, -math.inf)
    taken = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, ids, kept)
    rest = log_p.masked_fill(taken, -math.inf).logsumexp(-1)
    return Exact(listed, ids, lists.tail, temperature=T, log_rest=rest)


def compare(p: Problem, objective: Any, lists: fk.Lists, T: float = 1.0, teacher: Any = None, **options: Any) -> None:
    teacher = p.teacher() if teacher is None else teacher
    out = fk.kd_loss(p.student(), teacher, p.labels, objective, temperature=T, lists=lists, **options)
    ref = reference_kd_loss(p.student(), by_hand(p, teacher, lists, T), p.labels, objective, temperature=T)
    assert relative(out.loss, ref.loss) < TIGHT
    jumps = 4 if summands(objective) & JUMPS else 1
    for a, b in zip(gradients(out.loss, p.leaves), gradients(ref.loss, p.leaves), strict=True):
        assert relative(a, b) < TIGHT * jumps
    assert relative(out.difficulty, ref.difficulty) < TIGHT
    assert torch.equal(out.is_hard, ref.is_hard)


def allowed(objective: Any, tail: str) -> bool:
    return tail != "renormalize" or not any(term.of.everywhere for term in objective.spec.terms)


@pytest.mark.parametrize("chosen_by, tail, backend", cases(["teacher", "student"], TAILS, backends=HOSTED))
def test_equals_the_oracle(chosen_by: str, tail: str, backend: str) -> None:
    p = problem(N=5 if slow(backend) else 23, V=301)
    for objective in OBJECTIVES[:: 3 if slow(backend) else 1]:
        if allowed(objective, tail):
            compare(p, objective, fk.Lists(5 if slow(backend) else 12, chosen_by, tail), backend=backend)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("T", [0.6, 2.5])
@pytest.mark.parametrize("chosen_by", ["teacher", "student"])
def test_temperatures_and_top_p(chosen_by: str, T: float, tail: str) -> None:
    """A bucket is exact at any: the list is made at the temperature of the loss."""
    for objective in (fk.NoEvo(lam=0.6), fk.GeneralizedJSD(0.4), fk.ForwardKD(lam=0.4)):
        for top_p in (0.3, 0.9):
            compare(problem(V=301), objective, fk.Lists(12, chosen_by, tail, top_p), T)


@pytest.mark.parametrize("chosen_by", ["teacher", "student"])
def test_temperatures_of_tokens(chosen_by: str) -> None:
    p, lists = problem(N=17, V=211), fk.Lists(9, chosen_by)
    T = torch.rand(17) + 0.6
    found = fk.kd_loss(
        p.student(), p.teacher(), p.labels, fk.NoEvo(), temperature=T, lists=lists, reduction="none"
    ).loss
    each = [
        fk.kd_loss(
            fk.LMHead(p.hidden[i : i + 1], p.weight), fk.LMHead(p.hidden_t[i : i + 1], p.weight_t),
            p.labels[i : i + 1], fk.NoEvo(), temperature=float(T[i]), lists=lists, reduction="sum",
        ).loss
        for i in range(17)
    ]  # fmt: skip
    assert relative(found, torch.stack(each)) < TIGHT


@pytest.mark.parametrize("chosen_by", ["teacher", "student"])
def test_logits_scales_caps_and_a_small_vocabulary(chosen_by: str) -> None:
    """The teacher's given logits are read, never written; k beyond V lists all of them."""
    p = problem(V=301, ignored=0.0)  # rows that are gathered are copies
    logits = (p.hidden_t @ p.weight_t.T).detach()
    kept = logits.clone()
    compare(p, fk.NoEvo(), fk.Lists(10, chosen_by), teacher=logits)
    assert torch.equal(logits, kept)
    capped = fk.LMHead(p.hidden_t, p.weight_t, logit_scale=1.4, softcap=6.0)
    compare(p, fk.NoEvo(), fk.Lists(10, chosen_by), teacher=capped)
    compare(p, fk.NoEvo(), fk.Lists(10, chosen_by), teacher=fk.LMHead(p.hidden_t, p.weight_t, logit_scale=-1.4))
    small = problem(V=7)
    for tail in ("bucket", "listed"):
        dense = fk.kd_loss(small.student(), small.teacher(), small.labels, fk.NoEvo()).loss
        whole = fk.kd_loss(
            small.student(), small.teacher(), small.labels, fk.NoEvo(), lists=fk.Lists(50, chosen_by, tail)
        ).loss
        assert relative(whole, dense) < TIGHT


def test_low_precision() -> None:
    for dtype, limit in ((torch.bfloat16, 4e-3), (torch.float16, 6e-4)):
        p, lists = problem(V=301, dtype=dtype), fk.Lists(10)
        out = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.NoEvo(), lists=lists)
        copies = [x.detach().double().requires_grad_() for x in p.leaves]
        z = copies[0] @ copies[1].T
        ref = reference_kd_loss(z, by_hand(p, p.teacher(), lists), p.labels, fk.NoEvo())
        assert relative(out.loss, ref.loss) < 1e-5
        pairs = zip(gradients(out.loss, p.leaves), gradients(ref.loss, copies), strict=True)
        assert max(relative(a, b) for a, b in pairs) < limit


def test_a_peaked_teacher_leaves_a_finite_reverse_kl() -> None:
    """1 - sum p is 0 in fp32, the bucket's mass is not: KL(q||p) over the student's own list, whatever it is."""
    p = problem(V=301)
    p.weight_t *= 20
    lists = fk.Lists(4, "student")
    compare(p, fk.ReverseKD(lam=1.0), lists)
    loss = fk.kd_loss(p.student(), p.teacher(), p.labels, fk.ReverseKD(lam=1.0), lists=lists).loss
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("by", ["the loss", "log_probs_at"])
@pytest.mark.parametrize("tail", TAILS)
def test_an_entry_that_the_teacher_excludes_stays_listed(tail: str, by: str) -> None:
    """The limit of small probabilities: a student that is sure of what its teacher never says is far from it."""
    z = torch.tensor([[6.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    label = torch.tensor([1])

    def loss(value: float, objective: Any) -> Tensor:
        z_t, lists = torch.tensor([[value, 1.0, 0.0, 0.0, 0.0, 0.0]]), fk.Lists(2, "student", tail)
        student = z.clone().requires_grad_()
        if by == "the loss":
            made = fk.kd_loss(student, z_t, label, objective, lists=lists).loss
        else:
            ids = fk.top_k_of(z, 2).indices
            made = fk.kd_loss(student, fk.log_probs_at(z_t, ids, tail=tail), label, objective).loss
        return torch.stack([made.detach(), gradients(made, [student])[0].abs().sum()])

    for objective in (fk.TotalVariation(), fk.ForwardKD(lam=1)):
        assert relative(loss(-math.inf, objective), loss(-1e4, objective)) < 1e-6
    if tail != "renormalize":
        assert loss(-math.inf, fk.ReverseKD(lam=1))[0] == math.inf


def test_a_teacher_that_excludes_all_that_is_listed() -> None:
    """A bucket has all of it; over the list alone there is no distribution."""
    z, z_t = torch.tensor([[6.0, 5.0, 0.0, 0.0]]), torch.tensor([[-math.inf, -math.inf, 0.0, 0.0]])
    label = torch.tensor([0])
    bucket = fk.kd_loss(z, z_t, label, fk.TotalVariation(), lists=fk.Lists(2, "student")).loss
    assert relative(bucket, z.softmax(-1)[0, :2].sum()) < 1e-6
    for tail in ("listed", "renormalize"):
        assert fk.kd_loss(z, z_t, label, fk.TotalVariation(), lists=fk.Lists(2, "student", tail)).loss.isnan()


@pytest.mark.parametrize(
    "objective",
    [
        fk.ForwardKD(lam=1),
        fk.ReverseKD(lam=1),
        fk.NoEvo(lam=1),
        fk.SkewTeacher(lam=1),
        fk.SymmetricKL(0.3),
        fk.EntropyGated(2.0),
    ],
    ids=lambda x: x.name,
)
def test_a_label_without_a_part_in_the_loss_changes_nothing(objective: Any) -> None:
    """No label is taken out of the bucket for it."""
    p = problem(V=301, ignored=0.0)
    losses = {
        round(
            fk.kd_loss(
                p.student(), p.teacher(), torch.full_like(p.labels, y), objective, lists=fk.Lists(8)
            ).loss.item(),
            6,
        )
        for y in (0, 7, 20, 300)
    }
    assert len(losses) == 1
    compare(p, objective, fk.Lists(8))


def test_ranked_and_chunked() -> None:
    """Chunks of a few tokens give what one does, and the ranking spans them."""
    p = problem(N=61, V=301)
    whole, cut = (
        fk.kd_loss(
            p.student(), p.teacher(), p.labels, fk.SelfEvolutionTopK(fraction=0.3), lists=fk.Lists(9, "student"),
            memory_budget=budget,
        )
        for budget in (None, 60_000)
    )  # fmt: skip
    assert relative(cut.loss, whole.loss) < TIGHT and torch.equal(cut.is_hard, whole.is_hard)
    assert 0 < int(whole.is_hard.sum()) < int((p.labels != -100).sum())


def test_compiles_whole() -> None:
    p = problem(V=101)

    def step(*tensors: Tensor) -> Tensor:
        hidden, weight, hidden_t, weight_t, labels = tensors
        sides = fk.LMHead(hidden, weight), fk.LMHead(hidden_t, weight_t)
        return fk.kd_loss(*sides, labels, fk.NoEvo(), lists=fk.Lists(5, "student", "listed", 0.9)).loss

    given = (p.hidden, p.weight, p.hidden_t, p.weight_t, p.labels)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    assert relative(compiled, step(*given)) < 1e-6


@pytest.mark.parametrize("chosen_by", ["teacher", "student"])
def test_no_logits_of_all_tokens_are_held(chosen_by: str) -> None:
    p = problem(N=256, V=2000, ignored=0.0)
    with Allocations() as seen:
        fk.kd_loss(
            p.student(),
            p.teacher(),
            p.labels,
            fk.GeneralizedJSD(0.5),
            lists=fk.Lists(8, chosen_by),
            memory_budget=2 << 20,
        ).loss.backward()
    assert seen.largest < 256 * 2000 * 4 / 2


P = problem(N=4, V=50)
LISTED = fk.TopK(torch.zeros(4, 2), torch.tensor([[0, 1]] * 4))
MAP = fk.LMHead(P.hidden_t, P.weight_t, columns=torch.arange(50))
MESSAGES = [
    (TypeError, "lists must be a fused_kd.Lists or None, got 5", lambda: call(lists=5)),
    (ValueError, "lists must be None with a TopK, which is one", lambda: call(LISTED)),
    (ValueError, "lists must be None with columns", lambda: call(MAP)),
    (ValueError, "engine='streaming' makes no lists", lambda: call(engine="streaming")),
    (ValueError, "statistics must be empty with lists", lambda: call(statistics=("kl",))),
    (ValueError, "which is infinite", lambda: fk.KDLoss(fk.ReverseKD(), lists=fk.Lists(3, tail="renormalize"))),
    (ValueError, "whose ZLoss reads all logits", lambda: fk.KDLoss(fk.NoEvo() + fk.ZLoss(), lists=fk.Lists(3))),
    (ValueError, "k must be a positive integer, got 0", lambda: fk.Lists(0)),
    (TypeError, "k must be a positive integer, got 2.0", lambda: fk.Lists(2.0)),
    (TypeError, "k must be a positive integer, got True", lambda: fk.Lists(True)),
    (ValueError, "chosen_by must be 'teacher' or 'student', got 'both'", lambda: fk.Lists(3, "both")),
    (ValueError, "tail must be one of", lambda: fk.Lists(3, tail="none")),
    (ValueError, "top_p must be a number in (0, 1] or None, got 0.0", lambda: fk.Lists(3, top_p=0.0)),
    (ValueError, "top_p must be a number in (0, 1] or None, got nan", lambda: fk.Lists(3, top_p=math.nan)),
    (TypeError, "top_p must be a number in (0, 1] or None, got '0.9'", lambda: fk.Lists(3, top_p="0.9")),
]


def call(teacher: Any = None, *, lists: Any = fk.Lists(3), objective: Any = None, **options: Any) -> Any:  # noqa: B008
    return fk.kd_loss(
        P.student(),
        P.teacher() if teacher is None else teacher,
        P.labels,
        objective or fk.NoEvo(),
        lists=lists,
        **options,
    )


@pytest.mark.parametrize("kind, message, bad", MESSAGES, ids=[m for _, m, _ in MESSAGES])
def test_messages(kind: type[Exception], message: str, bad: Any) -> None:
    with pytest.raises(kind) as error:
        bad()
    assert message in str(error.value)


def test_lists_may_be_assigned() -> None:
    criterion = fk.KDLoss(fk.NoEvo(), lists=fk.Lists(3))
    assert "lists=Lists(k=3" in repr(criterion)
    criterion.lists = None
    with pytest.raises(TypeError, match="lists must be"):
        criterion.lists = 3
    reverse = fk.KDLoss(fk.ReverseKD(), lists=fk.Lists(3))
    with pytest.raises(ValueError, match="which is infinite"):
        reverse.lists = fk.Lists(3, tail="renormalize")
    assert reverse.lists == fk.Lists(3)
    moved = fk.KDLoss(fk.NoEvo(lam=1), lists=fk.Lists(3, tail="renormalize"))
    moved.objective = fk.NoEvo(lam=0.5)
    assert moved.objective == fk.NoEvo(lam=0.5)
    dense = fk.kd_loss(P.student(), P.teacher(), P.labels, fk.NoEvo()).loss
    assert torch.equal(criterion(P.student(), P.teacher(), P.labels), dense)


def test_without_a_teacher_there_is_nothing_to_list() -> None:
    loss = fk.kd_loss(P.student(), None, P.labels, fk.SFT(), lists=fk.Lists(3)).loss
    assert torch.equal(loss, fk.kd_loss(P.student(), None, P.labels, fk.SFT()).loss)
