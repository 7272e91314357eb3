"""What a student and its teacher may have in common, and the student that is its own teacher with its adapters off."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_kd import LMHead
from fused_kd.integrations.bodies import eval_mode, without_adapters
from fused_kd.integrations.heads import lm_head_of
from fused_kd.integrations.routing import routed_states


class AdaptersOff(torch.nn.Module):
    """The teacher that a PEFT model is without its adapters: a view of the student, not a copy.

    It has no parameters of its own; calls, ``generate`` and attributes are the student's, with the adapters off and in
    eval mode.

    Raises:
        ValueError: weights that the model has without its adapters are trained (PEFT's ``bias="all"``): the teacher
            would drift.
    """

    def __init__(self, student: Any) -> None:
        super().__init__()
        self._held = (student,)  # in a tuple the student is no submodule
        self._is_accelerate_prepared = True  # with the student
        with self.active():
            trained = [name for name, value in student.named_parameters() if value.requires_grad]
        if trained:
            raise ValueError(
                "the student with its adapters off must stay as it is to be the teacher, but of its own weights "
                f"{_listed(trained)} are trained: freeze them (bias='none'), or give a copy of the base as teacher"
            )

    @property
    def student(self) -> Any:
        """The PEFT model."""
        return self._held[0]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, the student is the teacher."""
        flags = [(value, value.requires_grad) for value in self.student.parameters()]  # PEFT sets them anew
        try:
            with eval_mode(self.student), self.student.disable_adapter():
                yield
        finally:
            for value, flag in flags:
                value.requires_grad_(flag)

    def head(self, hidden: torch.Tensor) -> LMHead:
        """The teacher's output head on its hidden states, (..., H)."""
        with self.active():
            return lm_head_of(self.student, hidden)

    def within(self, step: Any, then: Callable[[Callable[[], LMHead]], None]) -> None:
        """As of :mod:`fused_kd.integrations.forms`: the states first; the head is that of the student."""
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


def is_own_base(student: Any, teacher: Any) -> bool:
    """Whether ``teacher`` is the PEFT model ``student``, or the model that its adapters were put on."""
    return hasattr(student, "disable_adapter") and (teacher is student or teacher is without_adapters(student))


def paired(student: Any, teacher: Any) -> Any:
    """The teacher, as :class:`AdaptersOff` where it is the student or its base; raises as :func:`check_pair`."""
    if hasattr(teacher, "bound"):
        return teacher.bound(student)
    if is_own_base(student, teacher):
        teacher = AdaptersOff(student)
    check_pair(student, teacher)
    return teacher


def check_pair(student: Any, teacher: Any) -> None:
    """Raise ``ValueError`` if the student trains what is the teacher's too, or a model has a tuned prompt.

    Shared memory counts, whatever objects hold it. Frozen parameters may be shared.

    Args:
        student: a model.
        teacher: another model, :class:`AdaptersOff`, or None.
    """
    for name, model in (("model", student), ("teacher", teacher)):
        config: Any = getattr(model, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False) and str(config.peft_type.value) != "PREFIX_TUNING":
            raise ValueError(
                f"{name} must not have a tuned prompt ({config.peft_type.value}): its virtual tokens come before the "
                "rows, whose labels do not have them; use LoRA or prefix tuning"
            )
    if teacher is None:
        return
    if teacher is student:
        raise ValueError(
            "teacher must be another model than the student: it is frozen. Only a student with adapters (PEFT) can be "
            "its own teacher, for which they are off"
        )
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    shared = shared_parameters(trained, dict(teacher.named_parameters()))
    if shared:
        pairs = [name if name == other else f"{name} (the teacher's {other})" for name, other in shared.items()]
        raise ValueError(
            f"student and teacher share {len(shared)} of the {len(trained)} parameters to train: {_listed(pairs)}. "
            "The teacher would be trained too, or the student frozen with it: give the student copies "
            "(copy.deepcopy), or freeze what they share (requires_grad_(False))"
        )


def check_trainable(student: Any) -> None:
    """Raise ``ValueError`` if every parameter is frozen."""
    if not any(value.requires_grad for value in student.parameters()):
        raise ValueError(f"model must have a parameter to train, all of {type(student).__name__} are frozen")


def shared_parameters(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, str]:
    """``{name in first: name in second}`` of tensors that are the same object or overlap in memory."""
    same = {id(value): name for name, value in second.items()}
    spans: defaultdict[Any, list[tuple[int, int, str]]] = defaultdict(list)
    for name, value in second.items():
        for storage, begin, end in _spans(value):
            spans[storage].append((begin, end, name))
    found = {}
    for name, value in first.items():
        if id(value) in same:
            found[name] = same[id(value)]
            continue
        for storage, begin, end in _spans(value):
            for start, stop, other in spans.get(storage, ()):
                if begin < stop and start < end:
                    found[name] = other
    return found


def _spans(value: Any) -> Iterator[tuple[Any, int, int]]:
    """The storage and the range of addresses that a tensor lies in; of a tensor made of others, theirs."""
    value = getattr(value, "ds_tensor", value)  # ZeRO-3's part of a parameter
    if is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _spans(getattr(value, name))
    elif value.numel() and not value.is_meta:
        reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
        begin = value.data_ptr()
        yield (value.device, value.untyped_storage().data_ptr()), begin, begin + reach * value.element_size()


def _listed(names: list[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
