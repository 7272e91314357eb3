"""What a student and its teacher may have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fused_kd.integrations.bodies import without_adapters
from fused_kd.integrations.own import AdaptersOff, OwnTeacher, listed


def is_own_base(student: Any, teacher: Any) -> bool:
    """Whether ``teacher`` is the PEFT model ``student``, or the model that its adapters were put on."""
    return hasattr(student, "disable_adapter") and (teacher is student or teacher is without_adapters(student))


def paired(student: Any, teacher: Any) -> Any:
    """The teacher, as a :class:`StudentView` where it is an :class:`OwnTeacher`, or the student or its base (then
    :class:`AdaptersOff`); raises as :func:`check_pair`."""
    if isinstance(teacher, OwnTeacher):
        teacher = teacher.bound(student)
    elif is_own_base(student, teacher):
        teacher = AdaptersOff(student)
    check_pair(student, teacher)
    return teacher


def check_pair(student: Any, teacher: Any) -> None:
    """Raise ``ValueError`` if the student trains what is the teacher's too, or a model has a tuned prompt.

    Shared memory counts, whatever objects hold it. Frozen parameters may be shared.

    Args:
        student: a model.
        teacher: another model, a :class:`StudentView`, or None.
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
            "teacher must be another model than the student: it is frozen. A student without adapters (PEFT) can be "
            "its own teacher as an average, or with another prompt: fused_kd.integrations.own.OwnTeacher"
        )
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    shared = shared_parameters(trained, dict(teacher.named_parameters()))
    if shared:
        pairs = [name if name == other else f"{name} (the teacher's {other})" for name, other in shared.items()]
        raise ValueError(
            f"student and teacher share {len(shared)} of the {len(trained)} parameters to train: {listed(pairs)}. "
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
