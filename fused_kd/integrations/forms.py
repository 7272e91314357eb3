"""Whatever a trainer's teachers are: how the head, or the lists, of each get to where the student's loss is made.

A *form* has ``within(step, then)``, which calls ``then(give)`` where ``give()`` is the teacher's :class:`LMHead` or
:class:`TopK` of the step's tokens. That place may lie inside a call of the teacher, where its head is whole::

    models          inside the teacher's forward, in the call of its head module
    the student     its states first; then where its own head is whole
    given           anywhere: a cache's columns in the batch, or what a server answers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_kd import LMHead, Mixture, TopK
from fused_kd.integrations.labels import LABEL_PAD, without_first_targets
from fused_kd.integrations.prompted import checked_prompts
from fused_kd.integrations.teacher_columns import (
    BATCH_COLUMNS,
    LISTS,
    OTHER_LABELS,
    OTHER_PROMPT,
    TEACHER_ID,
    columns_of,
)

Give = Callable[[], LMHead | TopK]

# of prepared inputs: the batch as it was on the host
HOST = "teacher_batch_on_host"
_LISTS = columns_of(LISTS)
_ON_HOST = (TEACHER_ID, OTHER_LABELS)


class GivenTeacher(Protocol):
    """A teacher that is no model here: a cache, or a server.

    Optional: ``tail`` of a teacher that gives lists; ``vocab_size``, the rows of one that gives a head;
    ``check_tokenizer(tokenizer)``; ``prefetch(batch, targets)``, called when a batch is collated.

    Attributes:
        columns: what it reads of a batch.
    """

    columns: tuple[str, ...]

    def head(self, batch: Mapping[str, Any], targets: Tensor, device: torch.device) -> LMHead | TopK:
        """On ``device``, (rows, length, ...): position i has the distribution of token i + 1, as the student's states.

        Args:
            batch: the models' inputs and the teacher's columns; of a teacher without columns that has a prompt of its
                own in the batch, that.
            targets: (rows, length) bool on the CPU: where it will be read. Elsewhere it may hold anything.
        """


class Step(NamedTuple):
    """A batch as teachers see it.

    ``model`` is the student, wrapped as it trains; ``inputs`` are the models', ``columns`` those for teachers;
    ``targets`` (rows, length) bool on the CPU says which positions' distributions carry loss. ``host`` is the same
    batch before it was moved to a device, where that is known.
    """

    model: Any
    inputs: dict[str, Any]
    columns: dict[str, Tensor]
    targets: Tensor
    host: Step | None = None

    def rows(self, index: Tensor) -> Step:
        """Some of its rows."""

        def picked(name: str, value: Any) -> Any:
            own = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(self.targets)
            return value[index.to(value.device)] if own else value

        inputs, columns = ({k: picked(k, v) for k, v in part.items()} for part in (self.inputs, self.columns))
        host = None if self.host is None else self.host.rows(index)
        return self._replace(inputs=inputs, columns=columns, targets=self.targets[index], host=host)

    @property
    def read(self) -> dict[str, Any]:
        """What a model that teaches reads: the student's inputs, or a prompt of its own."""
        own = {name: self.columns[column] for column, name in OTHER_PROMPT.items() if column in self.columns}
        if not own:
            return self.inputs
        replaced = {name: value for name, value in self.inputs.items() if name not in OTHER_PROMPT.values()}
        return {**replaced, **own}

    @property
    def read_targets(self) -> Tensor:
        """As ``targets``, of :attr:`read`."""
        return targets_of(self.columns[OTHER_LABELS], shift=True) if OTHER_LABELS in self.columns else self.targets

    def placed(self, head: LMHead) -> LMHead:
        """A head on the states of :attr:`read`, with those at the student's positions."""
        if OTHER_LABELS not in self.columns:
            return head
        return replace(head, hidden=aligned(head.hidden, self.read_targets, self.targets))


def targets_of(labels: Tensor, shift: bool) -> Tensor:
    """(rows, length) bool on the CPU: the positions whose distribution carries loss."""
    carries = labels.cpu() != LABEL_PAD
    return torch.nn.functional.pad(carries[:, 1:], (0, 1)) if shift else carries


def aligned(hidden: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    """The states (rows, length_t, H) at the teacher's targets, k-th to k-th at the student's, 0 elsewhere.

    Raises:
        ValueError: a row with more targets on one side; names it.
    """
    counts, own = theirs.sum(1), ours.sum(1)
    if not torch.equal(counts, own):
        row = int((counts != own).nonzero()[0])
        raise ValueError(
            f"teacher_labels must hold as many labels with loss as labels do in each row, got {int(counts[row])} and "
            f"{int(own[row])} in row {row}"
        )
    rows, places = (index.to(hidden.device) for index in theirs.nonzero(as_tuple=True))
    own_rows, own_places = (index.to(hidden.device) for index in ours.nonzero(as_tuple=True))
    found = hidden.new_zeros(*ours.shape, hidden.shape[-1])
    found[own_rows, own_places] = hidden[rows, places]
    return found


class ModelForm:
    """A model of its own.

    Attributes:
        model: it, sharded as the student is once it runs.
        vocabulary: a :class:`fused_kd.integrations.vocabulary.TeacherMap`, or None.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.vocabulary: Any = None

    def within(self, step: Step, then: Callable[[Give], None]) -> None:
        self.model.eval()
        read = step.read if self.vocabulary is None else self.vocabulary.inputs(step.read)

        def routed(head: LMHead) -> dict[str, Tensor]:
            mapped = head if self.vocabulary is None else self.vocabulary.head(head)
            then(lambda: step.placed(mapped))
            return {}

        with torch.no_grad():
            self.model(**read, head_loss=routed)


class GivenForm:
    """One that is given with the batch, or by a server."""

    def __init__(self, given: Any) -> None:
        self.given: Any = given if hasattr(given, "head") else _Lists(given)

    @property
    def lists(self) -> bool:
        return getattr(self.given, "tail", None) is not None

    def within(self, step: Step, then: Callable[[Give], None]) -> None:
        columns = {name: step.columns[name] for name in self.given.columns if name in step.columns}
        missing = [name for name in self.given.columns if name not in columns and not name.endswith("_log_rest")]
        if missing:
            raise ValueError(
                f"batch must have {' and '.join(missing)} for the cached teacher {self.given!r}: the collators of "
                "fused_kd.training (Collator, PackingCollator) put those of cache.rows(...) there"
            )
        device = next(value.device for value in step.inputs.values() if isinstance(value, Tensor))
        if columns:  # each target's own, whatever prompt they were made with
            head = self.given.head({**step.inputs, **columns}, step.targets, device)
        else:
            asked = step.host or step  # what is sent is read on the host
            head = step.placed(self.given.head(asked.read, asked.read_targets, device))
        then(lambda: head)


class _Lists:
    """Any object with ``tail``, whose lists are in the batch."""

    def __init__(self, cache: Any) -> None:
        self._cache, self.columns = cache, _LISTS
        if hasattr(cache, "check_tokenizer"):
            self.check_tokenizer = cache.check_tokenizer

    @property
    def tail(self) -> str:
        return str(self._cache.tail)

    @property
    def keep(self) -> str:
        """As of a :class:`fused_kd.training.TeacherCache`."""
        return str(getattr(self._cache, "keep", "lists"))

    def head(self, batch: Mapping[str, Tensor], targets: Tensor, device: torch.device) -> TopK:
        log_probs, indices = (batch[name].to(device) for name in _LISTS)
        return TopK(log_probs, indices, self.tail)

    def __repr__(self) -> str:
        return repr(self._cache)


def is_given(teacher: Any) -> bool:
    """Whether a teacher is no model to run: it comes with the batch, or from a server."""
    return (hasattr(teacher, "head") or hasattr(teacher, "tail")) and not hasattr(teacher, "forward")


class Teaching:
    """All teachers of a trainer.

    Args:
        teachers: models, given teachers, or the student itself as an object with ``within``.
        weights: of several, whose probabilities are mixed; None: each row's ``teacher_id`` says whose it is.
    """

    def __init__(self, teachers: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        self.forms: list[Any] = [_form_of(teacher) for teacher in teachers]
        self.weights = weights
        self.sharded = False

    @property
    def models(self) -> list[ModelForm]:
        return [form for form in self.forms if isinstance(form, ModelForm)]

    @property
    def given(self) -> list[GivenForm]:
        return [form for form in self.forms if isinstance(form, GivenForm)]

    @property
    def columns(self) -> tuple[str, ...]:
        """What given teachers read of a batch."""
        return tuple(name for form in self.given for name in form.given.columns)

    @property
    def vocab_sizes(self) -> list[int]:
        """The rows of the heads that are given."""
        heads: list[Any] = [form.given for form in self.given if not form.lists]
        return [int(given.vocab_size) for given in heads if hasattr(given, "vocab_size")]

    def within(self, step: Step, then: Callable[[Callable[[], Any]], None]) -> None:
        """``then`` gets what makes the teacher of a loss, where all of its parts are whole."""
        if len(self.forms) == 1:
            self.forms[0].within(step, then)
            return
        parts: Sequence[tuple[Any, Tensor | None]] = [(form, None) for form in self.forms]
        how: dict[str, Any] = {"weights": self.weights}
        if self.weights is None:
            parts, how["which"] = self._by_row(step)
        self._nested(parts, step, [], lambda gives: then(lambda: Mixture([give() for give in gives], **how)))

    @property
    def prefetches(self) -> bool:
        return any(hasattr(form.given, "prefetch") for form in self.given)

    @property
    def reads_host(self) -> bool:
        """Whether what a given teacher is asked is in the inputs, and not in columns of its own."""
        return any(not form.given.columns for form in self.given)

    def on_host(self, batch: Mapping[str, Any], shift: bool) -> Step:
        """A checked batch that is on the host, for given teachers; ``shift``: position i predicts label i + 1."""
        inputs = {name: value for name, value in batch.items() if name not in (*BATCH_COLUMNS, "labels")}
        return Step(None, inputs, dict(batch), targets_of(batch["labels"], shift))

    def prefetch(self, batch: Mapping[str, Any], shift: bool) -> None:
        """Let given teachers begin with a batch that is on the host; ``shift``: position i predicts label i + 1."""
        if not self.prefetches or "labels" not in batch:
            return
        step = self.on_host(checked_prompts(without_first_targets(dict(batch))) if shift else batch, shift)
        parts: Sequence[tuple[Any, Tensor | None]] = [(form, None) for form in self.forms]
        if len(self.forms) > 1 and self.weights is None:
            parts, _ = self._by_row(step)
        for form, rows in parts:
            if isinstance(form, GivenForm) and hasattr(form.given, "prefetch"):
                asked = step if rows is None else step.rows(rows)
                form.given.prefetch(asked.read, asked.read_targets)

    def _by_row(self, step: Step) -> tuple[list[tuple[Any, Tensor | None]], Tensor]:
        """The teachers of this batch, each with its rows; and which of them is a token's."""
        if TEACHER_ID not in step.columns:
            raise ValueError(
                f"batch must have {TEACHER_ID} for {len(self.forms)} teachers without weights: which of them is a "
                "row's (a collator must keep it, as fused_kd.training.Collator does)"
            )
        ids = step.columns[TEACHER_ID].cpu()
        ids = ids if ids.dim() == 2 else ids[:, None].expand(step.targets.shape)
        bad = step.targets & ((ids < 0) | (ids >= len(self.forms)))
        if bool(bad.any()):
            raise ValueError(f"{TEACHER_ID} must be in [0, {len(self.forms)}), got {int(ids[bad][0])}")
        parts, first = [], torch.zeros(1, dtype=torch.int64)
        for number, form in enumerate(self.forms):
            rows = ((ids == number) & step.targets).any(1).nonzero().squeeze(1)
            if len(rows) == 0 and self.sharded and isinstance(form, ModelForm):
                rows = first  # it runs on all ranks
            if len(rows):
                parts.append((number, form, rows))
        parts = parts or [(0, self.forms[0], first)]
        which = torch.full(ids.shape, 0)
        for place, (number, _, _) in enumerate(parts):
            which[ids == number] = place
        return [(form, rows) for _, form, rows in parts], which

    def _nested(
        self, parts: Sequence[tuple[Any, Any]], step: Step, gives: list[Give], then: Callable[[list[Give]], None]
    ) -> None:
        """Each form within those before it, on the step or on its ``rows`` of it."""
        if not parts:
            then(gives)
            return
        (form, rows), *others = parts
        own = step if rows is None else step.rows(rows)

        def reached(give: Give) -> None:
            spread = give if rows is None else lambda: _spread(give(), rows, len(step.targets))
            self._nested(others, step, [*gives, spread], then)

        form.within(own, reached)


def _form_of(teacher: Any) -> Any:
    if hasattr(teacher, "within"):
        return teacher
    return GivenForm(teacher) if is_given(teacher) else ModelForm(teacher)


def _spread(teacher: LMHead | TopK, rows: Tensor, count: int) -> LMHead | TopK:
    """Of some rows, as that of all; the others hold what a list or a head may."""

    def whole(value: Tensor, fill: Any = 0) -> Tensor:
        found = value.new_empty(count, *value.shape[1:])
        found.copy_(fill) if isinstance(fill, Tensor) else found.fill_(fill)
        return found.index_copy_(0, rows.to(value.device), value)

    if isinstance(teacher, LMHead):
        return replace(teacher, hidden=whole(teacher.hidden))
    K = teacher.indices.shape[-1]
    ids = torch.arange(K, device=teacher.indices.device, dtype=teacher.indices.dtype)
    rest = None if teacher.log_rest is None else whole(teacher.log_rest, -torch.inf)
    return replace(
        teacher, log_probs=whole(teacher.log_probs, -math.log(K)),
        indices=whole(teacher.indices, ids), log_rest=rest,
    )  # fmt: skip


class Prefetching:
    """A collator that lets given teachers begin with a batch as soon as it is there."""

    def __init__(self, collate: Any, teaching: Teaching, shift: bool) -> None:
        self._collate, self._teaching, self._shift = collate, teaching, shift

    def __call__(self, rows: Any) -> Any:
        batch = self._collate(rows)
        self._teaching.prefetch(batch, self._shift)
        return batch


def on_device(columns: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What of a batch is for teachers, where it is read."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and name not in _ON_HOST else value
        for name, value in columns.items()
    }
