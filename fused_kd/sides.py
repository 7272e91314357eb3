"""The two sides of a call as flat tensors, and whether they fit each other, the labels and the weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import LMHead, TopK, check_dense, check_float_tensor


class FlatSide(NamedTuple):
    source: Tensor  # (N, H) or (N, V)
    weight: Tensor | None
    bias: Tensor | None
    logit_scale: float
    softcap: float
    vocab: int | None  # None where the side does not know
    shape: torch.Size
    indices: Tensor | None = None


def flatten(name: str, side: LMHead | TopK | Tensor) -> FlatSide:
    if isinstance(side, TopK) and name == "teacher":
        source, indices = (x.reshape(-1, x.shape[-1]) for x in (side.log_probs, side.indices))
        return FlatSide(source, None, None, 1.0, 0.0, None, side.log_probs.shape[:-1], indices)
    if isinstance(side, LMHead):
        source = side.hidden.reshape(-1, side.hidden.shape[-1])
        extras = (float(side.logit_scale), float(side.softcap or 0.0), side.vocab, side.leading_shape)
        return FlatSide(source, side.weight, side.bias, *extras)
    if not isinstance(side, Tensor):
        allowed = "an LMHead, a TopK or a tensor of logits" if name == "teacher" else "an LMHead or a tensor of logits"
        raise TypeError(f"{name} must be {allowed}, got {type(side).__name__}")
    check_float_tensor(name, side)
    if side.dim() < 2 or side.shape[-1] < 1:
        raise ValueError(f"{name} logits must have shape (..., V), got {tuple(side.shape)}")
    return FlatSide(side.reshape(-1, side.shape[-1]), None, None, 1.0, 0.0, side.shape[-1], side.shape[:-1])


def refuse_dtensors(*sides: LMHead | TopK | Tensor | None) -> None:
    for side in sides:
        for x in (side.hidden, side.weight) if isinstance(side, LMHead) else (side,):
            if type(x).__name__ == "DTensor":
                raise ValueError("student and teacher may hold DTensors only with tp_group, the mesh they lie on")


def common_vocab(student: FlatSide, teacher: FlatSide | None, vocab_size: int | None) -> int:
    sizes = [side.vocab for side in (student, teacher) if side is not None and side.vocab is not None]
    if vocab_size is not None:
        if vocab_size > min(sizes):
            raise ValueError(f"vocab_size must be at most {min(sizes)}, the smaller vocabulary, got {vocab_size}")
        return vocab_size
    if len(set(sizes)) > 1:
        raise ValueError(
            f"student and teacher have unequal vocabularies, {sizes[0]} and {sizes[1]}; if one is padded, pass "
            "vocab_size (the tokenizer's size) to cut both"
        )
    return sizes[0]


def check_alike(student: FlatSide, teacher: FlatSide | None, labels: Tensor, token_weights: Tensor | None) -> None:
    device = student.source.device
    if teacher is not None:
        if teacher.shape != student.shape:
            raise ValueError(
                f"teacher must hold the student's tokens, shape {tuple(student.shape)}, got {tuple(teacher.shape)}"
            )
        if teacher.source.device != device:
            raise ValueError(f"teacher is on {teacher.source.device}, student on {device}; they must share one device")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    check_dense("labels", labels)
    if labels.shape != student.shape:
        raise ValueError(f"labels must have the tokens' shape {tuple(student.shape)}, got {tuple(labels.shape)}")
    if labels.device != device and labels.device.type != "cpu":
        raise ValueError(f"labels must be on the student's device {device} or on the CPU, got {labels.device}")
    if token_weights is None:
        return
    if not isinstance(token_weights, Tensor) or not token_weights.is_floating_point():
        raise TypeError("token_weights must be a floating-point tensor")
    check_dense("token_weights", token_weights)
    if token_weights.shape != student.shape:
        raise ValueError(
            f"token_weights must have the tokens' shape {tuple(student.shape)}, got {tuple(token_weights.shape)}"
        )
    if token_weights.requires_grad:
        raise ValueError("token_weights must be constants, got a tensor that requires grad; detach it")


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    if labels.dim() == 0:
        raise ValueError("shift=True needs labels with a sequence dimension")
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], -1)


def autocast_dtype(device: torch.device, student: FlatSide, teacher: FlatSide | None) -> torch.dtype | None:
    """The dtype of GEMM operands under autocast, else None; without autocast a head's tensors must agree."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    for name, side in (("student", student), ("teacher", teacher)):
        if side is not None and side.weight is not None and side.weight.dtype != side.source.dtype:
            raise TypeError(
                f"{name} hidden is {side.source.dtype} and weight {side.weight.dtype}; outside autocast they must "
                "have one dtype"
            )
    return None
