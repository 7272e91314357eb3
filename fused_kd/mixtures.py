"""Several teachers as one: which they are, and how much each has of a token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .checks import check_dense, is_looked_at
from .inputs import LMHead, TopK, check_ids, check_logits

# By how much weights may add up to something else than 1.
SUM = 1e-3


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several teachers on the same tokens, whose probabilities are mixed: ``p = sum_i w_i p_i``.

    Each ``p_i`` is taken at the temperature of the loss. A list of pairs, ``[(0.3, first), (0.7, second)]``, is a
    mixture too, where a loss takes a teacher.

    Args:
        teachers: at least one; each an :class:`LMHead`, logits (..., V) or a :class:`TopK`, in any mix, of the
            student's tokens. An ``LMHead`` with ``columns`` must have the tail "renormalize" or "uniform". Of lists:

            - "renormalize" and "uniform" are distributions over the vocabulary, and mixed as such;
            - "bucket": its rest is not known entry by entry, so that the mixture is a list with a bucket too. It has
              the entries that all such lists with a part in the token share, at which the others are read too; what
              all have beyond these goes into the bucket.
        weights: one for each teacher, numbers or tensors (0-d or in the labels' shape), of at least 0, which add up to
            1 (to 1e-3; their sum is divided out). None: equal ones.
        which: (...) int64 or int32 in [0, number of teachers) in the labels' shape, instead of ``weights``: each
            token's only teacher. The others' logits of it are not made, and what they hold there is not looked at. On
            an accelerator this waits for the device once; give it on the CPU, as labels.

    Raises:
        TypeError, ValueError: for what does not fit. Values of tensors are looked at on the CPU; elsewhere a token with
            weights that are out of range has the loss NaN.
    """

    teachers: Sequence[LMHead | TopK | Tensor]
    weights: Sequence[float | Tensor] | None = None
    which: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.teachers, (Tensor, LMHead, TopK)) or not isinstance(self.teachers, Sequence):
            raise TypeError(f"teachers must be a sequence of teachers, got {type(self.teachers).__name__}")
        if not self.teachers:
            raise ValueError("teachers must hold at least one teacher, got none")
        for i, teacher in enumerate(self.teachers):
            if not isinstance(teacher, (LMHead, TopK)):
                check_logits(f"teachers[{i}]", teacher)
            if isinstance(teacher, TopK) and teacher.tail == "listed":
                raise ValueError(
                    f"teachers[{i}] must have the tail 'renormalize', 'uniform' or 'bucket' in a mixture, got "
                    "'listed', which renormalises the student over a list of its own"
                )
            if isinstance(teacher, LMHead) and teacher.columns is not None and teacher.tail in ("bucket", "listed"):
                raise ValueError(
                    f"teachers[{i}] must have the tail 'renormalize' or 'uniform' in a mixture, got columns with "
                    f"{teacher.tail!r}, whose categories the others do not have"
                )
        if self.which is not None:
            self._check_which(self.which)
        elif self.weights is not None:
            object.__setattr__(self, "weights", tuple(checked_weights(self.weights, len(self.teachers))))

    def _check_which(self, which: Any) -> None:
        if self.weights is not None:
            raise ValueError("weights must be None with which, whose teacher is a token's only one")
        check_ids("which", which)

    @property
    def named(self) -> list[tuple[str, LMHead | TopK | Tensor]]:
        """The teachers, each with its name for messages."""
        return [(f"teachers[{i}]", teacher) for i, teacher in enumerate(self.teachers)]

    def tokens_own(self, shape: torch.Size) -> Tensor | None:
        """``which`` of tokens of this shape, (N,) int64 on the CPU; None without it.

        Raises:
            ValueError: another shape.
        """
        if self.which is None:
            return None
        _check_shape("which", self.which, shape)
        return self.which.reshape(-1).to("cpu", torch.int64)

    def log_shares(self, shape: torch.Size, valid: Tensor, device: torch.device) -> Tensor:
        """(1 or N, teachers) fp32 logarithms of weights that add up to 1, of tokens of this shape; -inf: no part.

        ``valid`` (N,) bool are the tokens whose weights count.

        Raises:
            ValueError: for tensors of another shape; on the CPU, weights that are out of range.
        """
        count = len(self.teachers)
        if self.which is not None:
            _check_shape("which", self.which, shape)
            if is_looked_at(self.which) and is_looked_at(valid):
                check_which(self.which.reshape(-1)[valid], count)
            own = self.which.to(device, torch.int64, non_blocking=True).reshape(-1, 1)
            shares = own == torch.arange(count, device=device)
            return torch.where(shares, 0.0, -math.inf).masked_fill(~shares.any(1, keepdim=True), math.nan)
        weights = self.weights or (1.0 / count,) * count
        tensors = any(isinstance(weight, Tensor) for weight in weights)
        spread = []
        for i, weight in enumerate(weights):
            if isinstance(weight, Tensor):
                if weight.dim():
                    _check_shape(f"weights[{i}]", weight, shape)
                spread.append(weight.detach().to(device, torch.float64, non_blocking=True).expand(shape).reshape(-1))
            else:
                tokens = math.prod(shape) if tensors else 1
                spread.append(torch.full((tokens,), weight, dtype=torch.float64, device=device))
        together = torch.stack(spread, 1)
        total = together.sum(1, keepdim=True)
        sound = (together >= 0).all(1, keepdim=True) & ((total - 1).abs() <= SUM)
        looked_at = [is_looked_at(x) for x in (*weights, valid) if isinstance(x, Tensor)]
        if tensors and all(looked_at) and bool((bad := ~sound.squeeze(1) & valid).any()):
            token = int(bad.nonzero()[0])
            raise ValueError(
                f"weights must be at least 0 and add up to 1, got {together[token].tolist()} at token {token} (of the "
                "flattened tokens)"
            )
        return (together.log() - total.log()).masked_fill(~sound, math.nan).float()


def as_teacher(teacher: Any) -> Any:
    """A list of (weight, teacher) as the :class:`Mixture` that it is; anything else as it is.

    Raises:
        TypeError: a list of something else.
    """
    if isinstance(teacher, (list, tuple)):
        if not teacher or not all(isinstance(each, (list, tuple)) and len(each) == 2 for each in teacher):
            raise TypeError(
                "teacher must be an LMHead, a TopK, logits, a fused_kd.Mixture or a list of (weight, teacher), got a "
                f"{type(teacher).__name__} of {len(teacher)}"
            )
        teacher = Mixture([each for _, each in teacher], [weight for weight, _ in teacher])
    return teacher


def checked_weights(weights: Any, count: int) -> list[Any]:
    """Numbers or tensors, as many as there are teachers.

    Raises:
        TypeError, ValueError: others.
    """
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence):
        raise TypeError(f"weights must be a sequence, one for each teacher, got {type(weights).__name__}")
    if len(weights) != count:
        raise ValueError(f"weights must be as many as teachers, {count}, got {len(weights)}")
    for i, weight in enumerate(weights):
        if isinstance(weight, Tensor):
            if not weight.is_floating_point():
                raise TypeError(f"weights[{i}] must be a number or a floating-point tensor, got one of {weight.dtype}")
            check_dense(f"weights[{i}]", weight)
            if weight.requires_grad:
                raise ValueError(f"weights[{i}] must be a constant, got a tensor that requires grad; detach it")
        elif isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(f"weights[{i}] must be a number or a floating-point tensor, got {weight!r}")
        elif not 0.0 <= weight < math.inf:  # type: ignore[operator]
            raise ValueError(f"weights[{i}] must be at least 0, got {weight!r}")
    if not any(isinstance(weight, Tensor) for weight in weights):
        total = math.fsum(weights)
        if abs(total - 1.0) > SUM:
            raise ValueError(f"weights must add up to 1, got {list(weights)}, which add up to {total:g}")
    return list(weights)


def check_which(which: Tensor, count: int) -> None:
    """Raise ValueError for the first that is none of ``count`` teachers."""
    outside = (which < 0) | (which >= count)
    if bool(outside.any()):
        raise ValueError(f"which must be in [0, {count}), got {int(which[outside][0])}")


def _check_shape(name: str, value: Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have the labels' shape {tuple(shape)}, got {tuple(value.shape)}")
