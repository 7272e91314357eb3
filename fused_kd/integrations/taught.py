"""What trainers do with their teachers, one or several, before they run them."""

from __future__ import annotations

from typing import Any

from fused_kd.integrations.forms import ModelForm, Teaching, is_given
from fused_kd.integrations.heads import check_head_module, common_columns
from fused_kd.integrations.pair import paired
from fused_kd.integrations.teacher_columns import BATCH_COLUMNS
from fused_kd.integrations.weights import rows_of
from fused_kd.objectives import Objective
from fused_kd.options import check_tail


class Taught:
    """A part of trainers.

    Attributes:
        teaching: the teachers, once the student is there; None for objectives without one.
    """

    teaching: Teaching | None = None

    @property
    def teacher(self) -> Any:
        """The one teacher that is a model, or the student itself; None of several, and of a given one."""
        if self.teaching is None or len(self.teaching.forms) > 1 or self.teaching.given:
            return None
        form = self.teaching.forms[0]
        return form.model if isinstance(form, ModelForm) else form

    @property
    def _given_teachers(self) -> list[Any]:
        """Those that are no model here."""
        return [] if self.teaching is None else [form.given for form in self.teaching.given]

    def _own_models(self, student: Any) -> list[Any]:
        """The student, and the teachers that are models of their own."""
        return [student, *(form.model for form in (self.teaching.models if self.teaching else ()))]

    @property
    def _teacher_columns(self) -> tuple[str, ...]:
        """What of a batch is for teachers alone."""
        return (*BATCH_COLUMNS, *(self.teaching.columns if self.teaching else ()))


def teaching_of(teachers: list[Any], weights: list[float] | None, student: Any) -> Teaching | None:
    """What :func:`fused_kd.integrations.arguments.as_teachers` gives, for this student; None without teachers.

    Raises:
        ValueError: as :func:`fused_kd.integrations.pair.paired`.
    """
    pairs = [each if is_given(each) else paired(student, each) for each in teachers]
    return Teaching(pairs, weights) if pairs else None


def check_lists(
    teachers: list[Any], objective: Objective, options: dict[str, Any], statistics: tuple[str, ...]
) -> None:
    """
    Raises:
        ValueError: teachers that give lists, with an objective, ``options`` of a loss or ``statistics`` that they do
            not go with.
    """
    alone = len(teachers) == 1
    for tail in (getattr(each, "tail", None) for each in teachers if is_given(each)):
        if tail is None:
            continue
        if alone or tail == "bucket":
            check_tail(objective, str(tail), options["temperature"])
        if tail == "listed" and not alone:
            raise ValueError(
                "tail must be 'renormalize', 'uniform' or 'bucket' of one of several teachers, got 'listed'"
            )
        if options["lists"] is not None:
            raise ValueError(f"lists must be None with a cache, whose lists are made, got {options['lists']!r}")
        if statistics:
            names = ", ".join(statistics)
            raise ValueError(f"statistics need a teacher that is no list of entries, got {names} with a cache")


def columns_of(models: list[Any], teaching: Teaching | None) -> list[int]:
    """The rows of all heads, those of ``models`` first."""
    given = [] if teaching is None else teaching.vocab_sizes
    return [rows_of(check_head_module(each).weight) for each in models] + given


def vocab_of(models: list[Any], teaching: Teaching | None, vocab_size: int | None, tokenizer: Any) -> int | None:
    """As :func:`fused_kd.integrations.heads.common_columns`, of models and of heads that are given."""
    return common_columns(columns_of(models, teaching), vocab_size, tokenizer)
