"""What trainers do with their teachers, one or several, before they run them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fused_kd.integrations.forms import ModelForm, Teaching, is_given
from fused_kd.integrations.heads import check_head_module, common_columns
from fused_kd.integrations.pair import paired
from fused_kd.integrations.sampling import has_rows
from fused_kd.integrations.teacher_columns import BATCH_COLUMNS
from fused_kd.integrations.weights import rows_of
from fused_kd.objectives import Objective
from fused_kd.objectives.base import shown_value
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
        return tuple(dict.fromkeys((*BATCH_COLUMNS, *(self.teaching.columns if self.teaching else ()))))


def teaching_of(teachers: list[Any], weights: list[float] | None, student: Any) -> Teaching | None:
    """What :func:`fused_kd.integrations.arguments.as_teachers` gives, for this student; None without teachers.

    Raises:
        ValueError: as :func:`fused_kd.integrations.pair.paired`.
    """
    pairs = [each if is_given(each) else paired(student, each) for each in teachers]
    return Teaching(pairs, weights) if pairs else None


def check_lists(
    teachers: list[Any],
    weights: list[float] | None,
    objective: Objective,
    options: dict[str, Any],
    statistics: tuple[str, ...],
) -> None:
    """
    Raises:
        ValueError: teachers that give lists, with an objective, ``options`` of a loss, ``statistics`` or other teachers
            that they do not go with.
    """
    alone = len(teachers) == 1
    tails = {getattr(each, "tail", None) if is_given(each) else None for each in teachers}
    if weights is None and "bucket" in tails and len(tails) > 1:
        raise ValueError(
            "tail must be 'uniform' or 'renormalize' of lists whose rows stand among those of other teachers, got "
            "'bucket', which compares tokens over other categories: TeacherCache(..., tail='uniform')"
        )
    named = [name for each in teachers if is_given(each) for name in set(getattr(each, "columns", ()))]
    if len(named) > len(set(named)):
        raise ValueError(
            "teachers must read columns of their own, two of them read the same: TeacherCache(folder, name=...)"
        )
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


def check_drawn(teachers: list[Any], objective: Objective, temperature: Any) -> None:
    """Warn of drawn lists (``keep`` "sampled") where they are not right on average: where the gradient is not linear in
    p."""
    linear = all(term.divergence in (None, "kl") and not term.gate for term in objective.spec.terms)
    at_one = not isinstance(temperature, torch.Tensor) and temperature == 1.0
    if any(getattr(each, "keep", None) == "sampled" for each in teachers) and not (linear and at_one):
        warnings.warn(
            f"a drawn list is right on average for ForwardKD and NoEvo at temperature 1, not for {objective!r} at "
            f"{shown_value(temperature)}: keep lists or hidden states",
            stacklevel=4,
        )


def check_datasets(teachers: list[Any], columns: Iterable[str], train: Any, evaluated: Any) -> None:
    """Before the training, what else the first evaluation would find.

    Args:
        teachers: the given ones. columns: what rows may hold for teachers. train: data set. evaluated: another, or
            several by name.

    Raises:
        ValueError: rows of another cache than the teacher's; evaluation rows without what training rows have.
    """
    check_rows(teachers, train)
    for dataset in evaluated.values() if isinstance(evaluated, dict) else [evaluated]:
        check_rows(teachers, dataset)
        if not (has_rows(train) and has_rows(dataset) and len(train) and len(dataset)):
            continue
        first, other = train[0], dataset[0]
        lacking = [name for name in columns if name in first and name not in other]
        if lacking:
            raise ValueError(
                f"eval_dataset must have {' and '.join(lacking)} in its rows, as train_dataset has, for the teacher"
            )


def check_rows(teachers: list[Any], dataset: Any) -> None:
    """
    Raises:
        ValueError: rows of another cache than the teacher's, which cannot be read with it.
    """
    for given in teachers:
        if not hasattr(given, "check_head"):
            continue
        for cache in _caches_of(dataset):
            if cache is not given and set(cache.columns) & set(given.columns):
                given.check_head(cache)


def _caches_of(dataset: Any) -> Iterator[Any]:
    """Those that rows were opened with, whatever lies around the rows."""
    todo = [dataset]
    while todo:
        data = todo.pop()
        if hasattr(getattr(data, "cache", None), "columns"):
            yield data.cache
        inside = vars(data) if hasattr(data, "__dict__") else {}
        todo += [inside[name] for name in ("dataset", "rows") if name in inside]
        todo += list(inside.get("datasets", ()))


def columns_of(models: list[Any], teaching: Teaching | None) -> list[int]:
    """The rows of all heads, those of ``models`` first."""
    given = [] if teaching is None else teaching.vocab_sizes
    return [rows_of(check_head_module(each).weight) for each in models] + given


def vocab_of(models: list[Any], teaching: Teaching | None, vocab_size: int | None, tokenizer: Any) -> int | None:
    """As :func:`fused_kd.integrations.heads.common_columns`, of models and of heads that are given."""
    return common_columns(columns_of(models, teaching), vocab_size, tokenizer)
