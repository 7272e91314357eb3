"""Student and teacher as engines take them: tokens in a row, tensors of this rank, the dtype of GEMMs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .engines.problem import Side
from .inputs import LMHead, TopK, check_logits, refuse_dtensors


def flat_side(
    name: str, given: LMHead | TopK | Tensor | None, group: Any, *, teaches: bool = False
) -> tuple[Side, torch.Size, bool]:
    """A side with its tokens in a row, their shape, and whether the engine is to add up its hidden gradient over the
    ranks of a ``group``. The tensors of one that ``teaches`` are constants."""
    if isinstance(given, TopK) and teaches:
        values, indices = (x.detach().reshape(-1, x.shape[-1]) for x in (given.log_probs, given.indices))
        log_rest = None if given.log_rest is None else given.log_rest.detach().reshape(-1)
        side = Side(values, indices=indices, tail=given.tail, temperature=float(given.temperature), log_rest=log_rest)
        return side, given.log_probs.shape[:-1], True
    head = given if isinstance(given, LMHead) else None
    tensors: list[Any] = [given, None, None] if head is None else [head.hidden, head.weight, head.bias]
    sum_hidden = True
    if group is None:
        refuse_dtensors(*tensors)
    else:
        from .parallel import local_tensors

        tensors, sum_hidden = local_tensors(name, tensors, group)
    if head is None:
        check_logits(name, tensors[0])
    if teaches:
        tensors = [None if x is None else x.detach() for x in tensors]
    source, weight, bias = tensors
    shape, flat = source.shape[:-1], source.reshape(-1, source.shape[-1])
    if head is None:
        return Side(flat), shape, sum_hidden
    softcap = None if head.softcap is None else float(head.softcap)
    side = Side(flat, weight, bias, float(head.logit_scale), softcap)
    if head.columns is not None:
        if not teaches:
            raise ValueError(f"{name} must have no columns: they say which of the teacher's the student's are")
        if group is not None:
            raise ValueError("teacher must have no columns with tp_group: give each rank the rows that its own map to")
        side = replace(side, tail=head.tail, columns=head.columns)
    return side, shape, sum_hidden


def autocast_dtype(device: torch.device, **sides: Side | None) -> torch.dtype | None:
    """The dtype of GEMM operands under autocast, else None; without autocast a head's tensors must agree."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    for name, side in sides.items():
        if side is not None and side.weight is not None and side.weight.dtype != side.source.dtype:
            raise TypeError(
                f"{name} hidden is {side.source.dtype} and weight {side.weight.dtype}; outside autocast they must "
                "have one dtype"
            )
    return None
