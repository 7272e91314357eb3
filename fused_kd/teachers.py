"""The teacher of a call, one or several, as engines take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engines.dispatch import COLUMNS, TEACHERS, TOP_K
from .engines.problem import NO_LISTING, Listing, Side
from .inputs import Lists, LMHead, TopK
from .mixed_lists import as_one_list
from .mixtures import Mixture
from .objectives import Objective
from .options import check_map_tail, check_tail
from .sides import flat_side
from .terms import Number

AnyTeacher = LMHead | TopK | Tensor | Mixture | Sequence[tuple[float | Tensor, LMHead | TopK | Tensor]] | None


@dataclass(frozen=True, eq=False)
class Teachers:
    """``given`` is a mixture or one teacher; ``names`` for messages, ``sides`` and tokens' ``shapes`` are of each."""

    given: Any = None
    names: tuple[str, ...] = ()
    sides: tuple[Side, ...] = ()
    shapes: tuple[torch.Size, ...] = ()

    @property
    def asks(self) -> list[str]:
        """Of :func:`.engines.dispatch.choose_engine`."""
        found = [TOP_K] if any(side.indices is not None for side in self.sides) else []
        found += [COLUMNS] if any(side.columns is not None for side in self.sides) else []
        return found + ([TEACHERS] if len(self.sides) > 1 else [])

    @property
    def vocabs(self) -> list[int]:
        """V of those that know it."""
        return [side.vocab for side in self.sides if side.vocab is not None]

    @property
    def tail(self) -> str:
        """Of the one teacher; a mixture's are no matter of the row."""
        return self.sides[0].tail if len(self.sides) == 1 else ""

    def check(self, shape: torch.Size, device: torch.device) -> None:
        """
        Raises:
            ValueError: teachers of other tokens than the student's, of this shape, or on another device.
        """
        for name, side, own in zip(self.names, self.sides, self.shapes, strict=True):
            if own != shape:
                raise ValueError(f"{name} must hold the student's tokens, shape {tuple(shape)}, got {tuple(own)}")
            if side.source.device != device:
                raise ValueError(f"{name} is on {side.source.device}, student on {device}; they must share one device")

    def mixing(self, shape: torch.Size, valid: Tensor, device: torch.device) -> dict[str, Any]:
        """``others``, ``shares`` and ``which`` of a :class:`.engines.problem.Problem`; ``valid`` (N,) bool."""
        if len(self.sides) < 2:
            return {}
        mixture: Mixture = self.given
        which = mixture.tokens_own(shape)
        shares = None if which is not None else mixture.log_shares(shape, valid, device)
        return {"others": self.sides[1:], "shares": shares, "which": which}

    def listing(self, lists: Lists | None) -> Listing:
        """
        Raises:
            ValueError: lists to be chosen of what has no logits of the student's vocabulary.
        """
        if lists is None or not self.sides:
            return NO_LISTING
        for side in self.sides:
            if side.indices is not None or side.columns is not None:
                given = "a TopK, which is one" if side.indices is not None else "columns"
                raise ValueError(f"lists must be None with {given}, got {lists!r}")
        return Listing(lists.k, lists.chosen_by == "student", lists.tail, 1.0 if lists.top_p is None else lists.top_p)


NO_TEACHERS = Teachers()


def resolved(
    mixture: Mixture,
    objective: Objective,
    temperature: Number,
    vocab: int,
    valid: Tensor,
    *,
    lists: Lists | None,
    backend: str | None,
    tp_group: Any,
) -> Any:
    """A mixture; or what it comes to: its only teacher, or the list where lists are all that is known of it.

    ``valid`` are the tokens that carry loss, in the labels' shape.
    """
    if len(mixture.teachers) == 1:
        mixture.log_shares(valid.shape, valid.reshape(-1), valid.device)  # says what does not fit
        return mixture.teachers[0]
    if lists is not None:
        return mixture
    for _, each in mixture.named:
        if isinstance(each, TopK) and each.tail == "bucket":  # beside others the rest of a list is not 0
            check_tail(objective, each.tail, temperature, each.temperature)
    return as_one_list(mixture, temperature, vocab, valid, backend, tp_group)


def flat_teachers(given: Any, objective: Objective, temperature: Number, group: Any) -> Teachers:
    """
    Raises:
        TypeError, ValueError: what is no teacher, or does not go with the objective.
    """
    named = given.named if isinstance(given, Mixture) else [("teacher", given)]
    if not isinstance(given, Mixture):
        _check_teacher(given, objective, temperature)
    flat = [flat_side(name, each, group, teaches=True) for name, each in named]
    names = tuple(name for name, _ in named)
    return Teachers(given, names, tuple(side for side, *_ in flat), tuple(shape for _, shape, _ in flat))


def _check_teacher(teacher: LMHead | TopK | Tensor | None, objective: Objective, temperature: Number) -> None:
    if teacher is None:
        raise ValueError(f"teacher must be an LMHead, logits or a TopK for {objective!r}, got None")
    if isinstance(teacher, TopK):
        check_tail(objective, teacher.tail, temperature, teacher.temperature)
    if isinstance(teacher, LMHead) and teacher.columns is not None:
        check_map_tail(objective, teacher.tail)
