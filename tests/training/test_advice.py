"""The rule of docs/evidence.md, on what was measured, and when KDTrainer speaks."""

from __future__ import annotations

from typing import Any

import pytest

import fused_kd as fk
from fused_kd.training.advice import BEGINNER, FLOOR, KL, PAGE, STARVED, advised_objective, still_hard, warning

STARVING = fk.SelfEvolution()


def log(*shares: tuple[float, float | None], every: int = 10) -> list[dict[str, Any]]:
    entries = [{"step": every * (i + 1), "hard_fraction": hard} for i, (hard, _) in enumerate(shares)]
    for entry, (_, own) in zip(entries, shares, strict=True):
        if own is not None:
            entry["hard_fraction_t"] = own
    return entries


def test_shares() -> None:
    assert still_hard(0.4, 0.4) == 0.0 and still_hard(1.0, 0.4) == 1.0
    assert still_hard(0.7, 0.4) == pytest.approx(0.5) and still_hard(0.3, 0.4) < 0
    for hard, own, name in ((1.1, 0.0, "hard_fraction"), (-0.1, 0.0, "hard_fraction"), (0.5, 1.0, "hard_fraction_t")):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1"):
            still_hard(hard, own)
    with pytest.raises(ValueError, match=r"hard_fraction_t must be in \[0, 1\)"):
        still_hard(0.5, float("nan"))


def test_the_limits_and_their_sides() -> None:
    own = 0.5
    hard = own + (1 - own) * BEGINNER
    assert (advised_objective(hard - 1e-3, own), advised_objective(hard + 1e-3, own)) == (FLOOR, KL)
    hard = own + (1 - own) * STARVED
    for shift, told in ((-1e-3, False), (1e-3, True)):
        assert (warning(STARVING, log((hard + shift, own), (hard + shift, own)), 20, 100) is not None) == told
    assert [advised_objective(0.99), advised_objective(0.9)] == [KL, FLOOR]
    assert advised_objective(1.0, 1.0) == KL and advised_objective(0.99, 0.99) == KL
    for text in (KL, FLOOR):
        fk.objectives.parse(text)


def test_it_speaks_when_another_objective_fits_for_long() -> None:
    beginner, learner, near = (1.0, 0.3), (0.6, 0.3), (0.35, 0.3)
    text = warning(STARVING, log(beginner, beginner), 20, 100)
    assert text is not None and text.startswith("hard_fraction was 1.00 (0.30 for the teacher itself)")
    assert "stayed so for 20 steps" in text and f"objective={KL!r} or {FLOOR!r}" in text and text.endswith(PAGE)
    text = warning(STARVING, log(learner, learner), 20, 100)
    assert text is not None and f"objective={FLOOR!r} or {KL!r}" in text
    assert warning(STARVING, log(beginner), 10, 100) is None, "20 steps at least"
    assert warning(STARVING, log(beginner, beginner), 20, 1000) is None, "5 % of the training"
    assert warning(STARVING, log(beginner, near, beginner), 30, 100) is None, "not since the last good entry"
    assert warning(STARVING, log(near, beginner, beginner), 30, 100) is not None
    assert warning(STARVING, log(near, near, near), 30, 100) is None
    assert warning(STARVING, [], 30, 100) is None


def test_a_teacher_for_which_all_is_hard_says_nothing() -> None:
    assert warning(STARVING, log((1.0, 1.0), (1.0, 0.99)), 20, 100) is None


def test_without_the_teachers_own_share_only_a_beginner_is_told() -> None:
    assert warning(STARVING, log((0.97, None), (0.97, None)), 20, 100) is None
    text = warning(STARVING, log((0.99, None), (0.99, None)), 20, 100)
    assert text is not None and text.startswith("hard_fraction was 0.99 and has stayed")


@pytest.mark.parametrize(
    "objective",
    [
        fk.SelfEvolution(floor=0.3), fk.SelfEvolution(beta=1.0), fk.ForwardKD(), fk.GeneralizedJSD(), fk.AlphaBeta(),
        0.5 * fk.SFT() + 0.5 * fk.GeneralizedJSD(), 0.5 * fk.SFT() + 0.5 * fk.Skew(), 0.2 * fk.ForwardKD() + fk.Skew(),
    ],
    ids=str,
)  # fmt: skip
def test_other_objectives_are_not_warned_of(objective: Any) -> None:
    assert warning(objective, log((1.0, 0.3), (1.0, 0.3)), 20, 100) is None


def test_a_sum_that_hardly_teaches_hard_tokens_is_warned_of() -> None:
    for objective in (0.05 * fk.SFT() + 0.95 * fk.Skew(), 0.5 * fk.Skew() + 0.5 * fk.SelfEvolution()):
        assert warning(objective, log((1.0, 0.3), (1.0, 0.3)), 20, 100) is not None
