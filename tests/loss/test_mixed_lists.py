"""Mixtures that are lists: of lists alone, or with a bucket, whose rest is known as a whole."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import fused_kd as fk
from fused_kd.mixed_lists import as_one_list

from ..problems import CPU_BACKENDS, OBJECTIVES, furthest, gradients, label, problem, relative
from .mixed import compare, list_of, one_list, shares, target, teacher_of
from .test_mixtures import HOW, mixed, spoilt

CHOSEN = [
    fk.NoEvo(lam=0.6), fk.ForwardKD(lam=0.3), fk.SelfEvolution(gamma=2.0), fk.GeneralizedJSD(0.3),
    fk.ReverseKD(lam=0.6), fk.TotalVariation(),
]  # fmt: skip
LISTS = [
    ("uniform", "uniform"), ("uniform:20", "renormalize:3"), ("renormalize", "renormalize:20"),
    ("uniform:4", "renormalize", "uniform:30"), ("uniform:67", "renormalize"),
]  # fmt: skip
BUCKETS = [
    ("bucket:40", "bucket:50"), ("bucket", "bucket"), ("bucket:30", "head"), ("logits", "bucket", "uniform"),
    ("bucket:30", "renormalize:12"), ("bucket:45", "bucket:50", "capped"),
]  # fmt: skip


def ids(kinds: Any) -> str:
    return "+".join(kinds) if isinstance(kinds, tuple) else str(kinds)


def allowed(objective: Any, kinds: tuple[str, ...], how: str) -> bool:
    """Whether no token's p is 0 where the loss is infinite then."""
    tails = {kind.partition(":")[0] for kind in kinds}
    reads_all = any(term.of.everywhere for term in objective.spec.terms)
    return not reads_all or "renormalize" not in tails or (how not in ("tokens", "which") and len(tails) > 1)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kinds", LISTS, ids=ids)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_lists_alone(backend: str, kinds: tuple[str, ...], how: str) -> None:
    """Overlapping, of different lengths, padded: p on all entries of all, the rest from the others' uniform shares."""
    p = problem(N=17, V=67)
    teachers, shared = mixed(p, kinds, how)
    for objective in CHOSEN:
        if allowed(objective, kinds, how):
            compare(p, teachers, objective, backend=backend, reference=backend == "torch", **shared)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kinds", BUCKETS, ids=ids)
@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_buckets(backend: str, kinds: tuple[str, ...], how: str) -> None:
    """The entries that all buckets share, and one rest of everybody's; or each token's own list."""
    p = problem(N=17, V=67)
    if how == "which" and {kind.partition(":")[0] for kind in kinds} != {"bucket"}:
        return
    teachers, shared = mixed(p, kinds, how)
    for objective in CHOSEN:
        compare(p, teachers, objective, backend=backend, reference=backend == "torch", **shared)


def test_a_token_without_a_bucket_is_refused() -> None:
    """Nothing would say what it is compared over; where it carries no loss, that is no matter."""
    p = problem(N=17, V=67)
    bucket, head = list_of(torch.randn(17, 67), 20, "bucket"), p.teacher()
    weights = torch.full((17,), 0.5).index_fill(0, torch.tensor([4]), 0.0)
    with pytest.raises(ValueError, match=r"weights must give .* 'bucket' a part .* got 0 at token 4"):
        fk.kd_loss(p.student(), [(weights, bucket), (1 - weights, head)], p.labels, fk.NoEvo())
    with pytest.raises(ValueError, match="got 0 at token 0"):
        fk.kd_loss(p.student(), [(0.0, bucket), (1.0, head)], p.labels, fk.NoEvo())
    labels = p.labels.index_fill(0, torch.tensor([4]), -100)
    assert fk.kd_loss(p.student(), [(weights, bucket), (1 - weights, head)], labels, fk.NoEvo()).loss.isfinite()


MANY = [pytest.param(x, marks=pytest.mark.exhaustive) for x in OBJECTIVES if x.spec.needs_teacher]


@pytest.mark.parametrize("kinds", [("uniform", "uniform:20"), ("bucket:40", "head")], ids=ids)
@pytest.mark.parametrize("objective", MANY, ids=label)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_objective(backend: str, objective: Any, kinds: tuple[str, ...]) -> None:
    p = problem(N=17, V=67)
    if kinds[0] != "uniform" and any(term.z_loss for term in objective.spec.terms):
        pytest.skip("reads all logits")
    teachers, shared = mixed(p, kinds, "numbers")
    compare(p, teachers, objective, tight=2e-5, backend=backend, reference=False, **shared)


def test_disjoint_lists() -> None:
    """Buckets that share nothing leave one category, in which any student is right but for the label."""
    p = problem(N=9, V=67)
    logits = torch.randn(9, 67)
    logits[:, 1::2] -= 20
    logits[:, 66] -= 20  # would come to 0
    first, second = (list_of(x, 5, "bucket") for x in (logits, logits.roll(1, 1)))
    listed = first.indices >= 0
    assert not (first.indices[listed] % 2).any() and bool((second.indices[listed] % 2).all())
    lists = {tail: [replace(x, tail=tail) for x in (first, second)] for tail in ("bucket", "uniform", "renormalize")}
    for teachers in lists.values():
        compare(p, teachers, fk.NoEvo(lam=0.6), weights=(0.3, 0.7))
    assert fk.kd_loss(p.student(), fk.Mixture(lists["bucket"]), p.labels, fk.TotalVariation()).loss.abs() < 1e-6


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_temperatures_of_lists(T: float) -> None:
    """Each is flattened from its own to the loss's; a bucket is exact at its own alone."""
    p, logits = problem(N=17, V=67), torch.randn(3, 17, 67) * 3
    lists = [list_of(x, 12, "uniform", temperature=own) for x, own in zip(logits, (1.0, 2.0, 0.7), strict=True)]
    for objective in CHOSEN:
        compare(p, lists, objective, weights=(0.2, 0.3, 0.5), T=T)
        compare(p, [list_of(logits[0], 30, "bucket", temperature=T), p.teacher(), lists[1]], objective, T=T)


def test_a_rest_that_is_not_told() -> None:
    """Without ``log_rest`` it is what is missing to 1; lists that add up to less than 1 with it are made to."""
    p, logits = problem(N=17, V=67), torch.randn(2, 17, 67)
    for tail in ("uniform", "bucket"):
        lists = [list_of(x, 30, tail, rest=False) for x in logits]
        compare(p, lists, fk.NoEvo(lam=0.6), weights=(0.4, 0.6))
        short = replace(lists[0], log_probs=lists[0].log_probs - 0.3, log_rest=torch.full((17,), -1.0))
        compare(p, [short, lists[1]], fk.NoEvo(lam=0.6), weights=(0.4, 0.6))


@pytest.mark.parametrize("tail", ["uniform", "renormalize", "bucket"])
def test_what_a_mixture_of_lists_is_no_more_than(tail: str) -> None:
    p = problem(N=17, V=67)
    first, other = teacher_of(f"{tail}:20", p), teacher_of(tail, p, 1)
    alone = fk.kd_loss(p.student(), first, p.labels, fk.NoEvo())
    grads, away = gradients(alone.loss, p.leaves), spoilt(other, p.labels > -200)
    for teacher in (
        [(1.0, first)], [(0.3, first), (0.7, first)], [(1.0, first), (0.0, other)], [(0.0, other), (1.0, first)],
        [(1.0, first), (torch.zeros(17), away)], [(torch.zeros(()), away), (1, first)],
        fk.Mixture([away, first], which=torch.ones(17, dtype=torch.int64)),
    ):  # fmt: skip
        out = fk.kd_loss(p.student(), teacher, p.labels, fk.NoEvo())
        assert relative(out.loss, alone.loss) < 1e-6 and relative(out.difficulty, alone.difficulty) < 1e-6
        assert furthest(gradients(out.loss, p.leaves), grads) < 2e-6


def test_the_list_that_a_mixture_is() -> None:
    """Each entry once, ascending; masses add up to 1; the rest has what the others have beyond the shared."""
    p, valid = problem(N=17, V=67), torch.ones(17, dtype=torch.bool)
    for kinds in (("uniform:20", "uniform:30"), ("bucket:30", "bucket:40"), ("bucket:30", "head")):
        teachers = [teacher_of(kind, p, i) for i, kind in enumerate(kinds)]
        made = as_one_list(fk.Mixture(teachers, (0.3, 0.7)), 1.0, 67, valid, "torch")
        assert isinstance(made, fk.TopK) and made.log_rest is not None
        listed = made.log_probs > -math.inf
        if made.tail == "bucket":
            ref = one_list(teachers, 67, shares((0.3, 0.7), None, 2, 17))
            expected, rest = ref.log_probs.exp(), ref.log_rest.exp()
        else:
            expected = target(teachers, 67, shares((0.3, 0.7), None, 2, 17))
            rest = torch.stack(
                [row[~_there(ids[own])].sum() for row, ids, own in zip(expected, made.indices, listed, strict=True)]
            )
        found = torch.zeros(17, 67)
        for row, values, entries, own in zip(found, made.log_probs, made.indices, listed, strict=True):
            assert len(entries[own].unique()) == int(own.sum())
            row[entries[own]] = values[own].exp()
        inside = found > 0
        assert relative(found[inside], expected[inside]) < 1e-6 and relative(made.log_rest.exp(), rest) < 1e-6
        total = made.log_probs.double().exp().sum(1) + made.log_rest.double().exp()
        assert float((total - 1).abs().max()) < 1e-6
    assert isinstance(
        as_one_list(fk.Mixture([teacher_of("uniform", p), p.teacher()]), 1.0, 67, valid, None), fk.Mixture
    )


def _there(entries: torch.Tensor) -> torch.Tensor:
    return torch.zeros(67, dtype=torch.bool).index_fill(0, entries, True)


@pytest.mark.parametrize("tail", ["uniform", "bucket"])
def test_where_looking_would_wait_what_is_wrong_is_nan(tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the token that has it, and no other."""
    from fused_kd import mixed_lists, mixtures, ops

    for module in (mixed_lists, mixtures):
        monkeypatch.setattr(module, "is_looked_at", lambda value: False)
    monkeypatch.setattr(ops, "check_top_k", lambda *_: None)
    p = problem(N=9, V=67, ignored=0.0)
    lists = [teacher_of(f"{tail}:20", p, i) for i in range(2)]
    lists[0].indices[3, 5] = lists[0].indices[3, 6]
    lists[1].log_probs[5, 2] = math.nan
    weights = torch.full((9,), 0.5)
    weights[7] = 0.9
    out = fk.kd_loss(p.student(), [(weights, lists[0]), (0.5, lists[1])], p.labels, fk.NoEvo(), reduction="none").loss
    assert out.isnan().nonzero().squeeze(1).tolist() == [3, 5, 7]
    which = torch.tensor([0, 1, 2, 1, 0, 0, 1, -1, 0])
    out = fk.kd_loss(p.student(), fk.Mixture(lists, which=which), p.labels, fk.NoEvo(), reduction="none").loss
    assert out.isnan().nonzero().squeeze(1).tolist() == [2, 7]
