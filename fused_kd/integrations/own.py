"""The student as its own teacher: with its adapters off, as an average of itself, or as it is (with another prompt)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_kd import LMHead
from fused_kd.integrations.bodies import eval_mode, without_adapters
from fused_kd.integrations.heads import lm_head_of
from fused_kd.integrations.routing import routed_states
from fused_kd.integrations.teacher_columns import OTHER_IDS, OTHER_LABELS


@dataclass(frozen=True, kw_only=True)
class OwnTeacher:
    """What a trainer takes as ``teacher`` where the student teaches itself; no second model is held.

    - ``OwnTeacher(adapters=False)``: a PEFT student with its adapters off. Needs no memory of its own.
    - ``OwnTeacher(decay=0.999)``: an exponential moving average of what is trained. It begins as the student is when
      the training begins; after each optimizer step (one for all batches of an accumulation) it becomes
      ``decay * average + (1 - decay) * student``. Kept of the trained parameters alone (of a LoRA student the
      adapters), in float32, or float64 where they are: in half precision the small steps would round to nothing. It is
      in each checkpoint (``own_teacher.safetensors``) and goes on from there.
    - ``OwnTeacher()``: the student as it is, in eval mode and without gradient. Only with another prompt
      (``teacher_input_ids`` in the batch): with the same one the target would be the student's own output.

    Each may have another prompt. Under FSDP2 and ZeRO-3 an average is refused, as each process has only its part of
    the weights; on each process of DDP lies an equal average.

    Args:
        adapters: whether the teacher has the student's adapters; default True.
        decay: how much of the average stays at a step, above 0 and at most 1 (then it stays what it is at first); None
            (default): no average.

    Raises:
        TypeError: ``adapters`` is no bool, ``decay`` no number.
        ValueError: ``decay`` out of its range, or given with ``adapters=False``, where nothing that moves is left.
    """

    adapters: bool = True
    decay: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.adapters, bool):
            raise TypeError(f"adapters must be True or False, got {self.adapters!r}")
        if self.decay is None:
            return
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)):
            raise TypeError(f"decay must be a number, or None for no average, got {self.decay!r}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay!r}")
        if not self.adapters:
            raise ValueError(
                f"decay must be None with adapters=False, got {self.decay!r}: without its adapters the student stays "
                "as it is, and so does its average"
            )

    def bound(self, student: Any) -> StudentView:
        """This teacher of one student.

        Raises:
            ValueError: a student without adapters to put off, or one that trains more than its adapters.
        """
        if not self.adapters:
            return AdaptersOff(student)
        return AsItIs(student) if self.decay is None else MovingAverage(student, float(self.decay))


class StudentView(torch.nn.Module):
    """A teacher that is the student in another state: a view, not a copy.

    It has no parameters of its own; calls, ``generate`` and attributes are the student's, in that state and in eval
    mode.

    Args:
        student: any Hugging Face language model, with adapters or without.
    """

    def __init__(self, student: Any) -> None:
        super().__init__()
        self._held = (student,)  # in a tuple the student is no submodule
        self._is_accelerate_prepared = True  # with the student

    @property
    def student(self) -> Any:
        """The model that is trained."""
        return self._held[0]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, the student is the teacher."""
        # autocast keeps what it has cast: of other weights, or cut from the graph
        torch.clear_autocast_cache()
        try:
            with eval_mode(self.student), self._changed():
                yield
        finally:
            torch.clear_autocast_cache()

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """Within, the student's weights are the teacher's."""
        yield

    def head(self, hidden: torch.Tensor) -> LMHead:
        """The teacher's output head on its hidden states, (..., H), without gradient; it stays the teacher's."""
        with self.active():
            return _constant(lm_head_of(self.student, hidden))

    def within(self, step: Any, then: Callable[[Callable[[], LMHead]], None]) -> None:
        """As of :mod:`fused_kd.integrations.forms`: the states first; its head where the student's is whole."""
        with torch.no_grad(), self.active():
            states = routed_states(step.model, step.read)
        then(lambda: step.placed(self.head(states)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.active():
            return self.student(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The student's, as the teacher."""
        with self.active():
            return self.student.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_held")
        try:
            return super().__getattr__(name)
        except AttributeError:
            if held is None or name.startswith("_"):
                raise
            return getattr(held[0], name)


class AsItIs(StudentView):
    """The student itself, to be given another prompt."""

    def within(self, step: Any, then: Callable[[Callable[[], LMHead]], None]) -> None:
        """As of :class:`StudentView`; ``ValueError`` for a batch without another prompt."""
        if OTHER_IDS not in step.columns:
            raise ValueError(
                f"batch must have {OTHER_IDS} and {OTHER_LABELS} for OwnTeacher(), another prompt than the "
                "student's (fused_kd.training.with_context; a collator must keep them, as fused_kd.training.Collator "
                "does): with the same one the target is its own output"
            )
        super().within(step, then)


class AdaptersOff(StudentView):
    """The teacher that a PEFT model is without its adapters.

    Raises:
        ValueError: a model without adapters; weights that the model has without its adapters are trained (PEFT's
            ``bias="all"``): the teacher would drift.
    """

    def __init__(self, student: Any) -> None:
        if not hasattr(student, "disable_adapter"):
            raise ValueError(
                f"adapters=False needs a student with adapters (PEFT), {type(student).__name__} has none: give a copy "
                "of it as teacher, or OwnTeacher(decay=1), which keeps what is trained as it is at first"
            )
        super().__init__(student)
        with self.active():
            trained = [name for name, value in student.named_parameters() if value.requires_grad]
        if trained:
            raise ValueError(
                "the student with its adapters off must stay as it is to be the teacher, but of its own weights "
                f"{listed(trained)} are trained: freeze them (bias='none'), or give a copy of the base as teacher"
            )

    @contextmanager
    def _changed(self) -> Iterator[None]:
        flags = [(value, value.requires_grad) for value in self.student.parameters()]  # PEFT sets them anew
        try:
            with self.student.disable_adapter():
                yield
        finally:
            for value, flag in flags:
                value.requires_grad_(flag)


class MovingAverage(StudentView):
    """The exponential moving average of what is trained, with the student's other weights.

    Its tensors take the place of the student's for the teacher's forward; of parameters in half precision casts of
    them, for as long as that lasts.

    Args:
        student: as of :class:`StudentView`.
        decay: as of :class:`OwnTeacher`.
    """

    def __init__(self, student: Any, decay: float) -> None:
        super().__init__(student)
        self.decay = decay
        self._begun = False
        self._averages: dict[str, torch.Tensor] = {}
        self._pairs: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def follow(self) -> None:
        """Begin with the student's values, unless a step has been averaged or an earlier run goes on; call it when the
        training begins.

        Raises:
            ValueError: parameters of which this process has only a part.
        """
        trained = self._trained()
        if not self._begun:
            self._averages = {name: value.detach().to(_kept(value), copy=True) for name, value in trained.items()}
        self._averages = {name: average.to(trained[name].device) for name, average in self._averages.items()}
        self._pairs = [(trained[name], average) for name, average in self._averages.items()]

    @torch.no_grad()
    def update(self) -> None:
        """One step: ``decay * average + (1 - decay) * student``."""
        share = 1.0 - self.decay
        self._follow_once()
        self._begun = True
        alike = [(average, value.detach()) for value, average in self._pairs if value.dtype == average.dtype]
        if alike:
            averages, values = zip(*alike, strict=True)
            torch._foreach_lerp_(averages, values, share)
        for value, average in self._pairs:
            if value.dtype != average.dtype:
                average.lerp_(value.to(average.dtype), share)

    def averages(self) -> dict[str, torch.Tensor]:
        """The averages by the names of the student's parameters, not copied."""
        self._follow_once()
        return self._averages

    def restore(self, averages: Mapping[str, torch.Tensor]) -> None:
        """Go on from :meth:`averages` of an earlier run.

        Raises:
            ValueError: they are those of other parameters.
        """
        trained = self._trained()
        shapes = {name: value.shape for name, value in trained.items()}
        given = {name: value.shape for name, value in averages.items()}
        if given != shapes:
            differing = sorted(name for name in {*given, *shapes} if given.get(name) != shapes.get(name))
            raise ValueError(f"averages must be of what the student trains, they differ in {listed(differing)}")
        self._averages = {
            name: averages[name].to(value.device, _kept(value), copy=True) for name, value in trained.items()
        }
        self._begun = True
        self.follow()

    def head(self, hidden: torch.Tensor) -> LMHead:
        """The teacher's output head on its hidden states, (..., H), without gradient; it stays the teacher's."""
        self._follow_once()
        module = without_adapters(self.student).get_output_embeddings()
        own = {id(value) for value in module.parameters()}
        # all others would be cast for nothing
        with eval_mode(self.student), self._exchanged(lambda value: id(value) in own):
            return _constant(lm_head_of(self.student, hidden))

    @contextmanager
    def _changed(self) -> Iterator[None]:
        self._follow_once()
        with self._exchanged(lambda value: True):
            yield

    @contextmanager
    def _exchanged(self, wanted: Callable[[torch.nn.Parameter], bool]) -> Iterator[None]:
        """Within, the averages are in the place of those parameters."""
        held = [(value, value.data, average) for value, average in self._pairs if wanted(value)]
        try:
            for value, _, average in held:
                value.data = average.to(value.device, value.dtype)
            yield
        finally:
            for value, data, _ in held:
                value.data = data

    def _follow_once(self) -> None:
        if not self._averages:
            self.follow()

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        trained = {name: value for name, value in self.student.named_parameters() if value.requires_grad}
        for name, value in trained.items():
            if hasattr(value, "ds_id") or is_traceable_wrapper_subclass(value):
                raise ValueError(
                    f"decay must be None where weights are sharded or made of other tensors, as {name} is "
                    f"({type(value).__name__}): an average needs each whole"
                )
        return trained


def listed(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _kept(value: torch.Tensor) -> torch.dtype:
    """The dtype of a parameter's average."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _constant(head: LMHead) -> LMHead:
    """A head whose weights stay what they are now, when a parameter gets other data."""
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)
