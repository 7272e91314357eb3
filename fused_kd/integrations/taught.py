"""What a trainer keeps of its teachers, one or several."""

from __future__ import annotations

from typing import Any

from fused_kd.integrations.arguments import as_teachers
from fused_kd.integrations.forms import ModelForm, Teaching, is_given
from fused_kd.integrations.pair import paired
from fused_kd.integrations.teacher_columns import BATCH_COLUMNS
from fused_kd.objectives import Objective
from fused_kd.options import check_tail


class Taught:
    """A part of :class:`fused_kd.integrations.mixin.KDLossMixin`.

    Attributes:
        teaching: the teachers, once the student is there; None for objectives without one.
    """

    teaching: Teaching | None = None
    _given: list[Any]
    _weights: list[float] | None

    def take_teachers(
        self, teacher: Any, objective: Objective, options: dict[str, Any], statistics: tuple[str, ...]
    ) -> None:
        """What a trainer is given as its teacher, with an objective, ``options`` of a loss and ``statistics``.

        Raises:
            TypeError, ValueError: what is no teacher, or does not go with these.
        """
        self._given, self._weights = as_teachers(teacher if objective.spec.needs_teacher else None)
        if objective.spec.needs_teacher and not self._given:
            raise ValueError(f"teacher must be given for {objective!r}")
        alone = len(self._given) == 1
        for tail in (getattr(each, "tail", None) for each in self._given if is_given(each)):
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

    def pair_teachers(self, student: Any) -> None:
        """Set ``teaching`` of this student; raises as :func:`fused_kd.integrations.pair.paired`."""
        pairs = [each if is_given(each) else paired(student, each) for each in self._given]
        self.teaching = Teaching(pairs, self._weights) if pairs else None

    @property
    def teacher(self) -> Any:
        """The one teacher that is a model, or the student itself; None of several, and of a given one."""
        if self.teaching is None or len(self.teaching.forms) > 1 or self.teaching.given:
            return None
        form = self.teaching.forms[0]
        return form.model if isinstance(form, ModelForm) else form

    @property
    def given_teachers(self) -> list[Any]:
        """Those that are no model here."""
        return [] if self.teaching is None else [form.given for form in self.teaching.given]

    def own_models(self, student: Any) -> list[Any]:
        """The student, and the teachers that are models of their own."""
        return [student, *(form.model for form in (self.teaching.models if self.teaching else ()))]

    @property
    def teacher_columns(self) -> tuple[str, ...]:
        """What of a batch is for teachers alone."""
        return (*BATCH_COLUMNS, *(self.teaching.columns if self.teaching else ()))
