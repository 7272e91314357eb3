"""What a call's losses are multiplied by: token weights, and one over the denominator of a mean."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .inputs import check_dense

# One over a denominator must be a normal fp32 number too.
LEAST, MOST = 1e-37, 1e37
_DENOMINATOR = f"a number in [{LEAST:g}, {MOST:g}]"


def weights_and_scale(
    labels: Tensor,
    token_weights: Tensor | None,
    num_items: float | Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    validate: bool,
    device: torch.device,
) -> tuple[Tensor | None, Tensor]:
    """Token weights (N,) fp32 on the device, 0 for ignored tokens, and the factor of their sum, a 0-d tensor.

    What is out of range raises where looking is free (tensors on the CPU) or asked for (``validate``) and is NaN
    elsewhere. The factor of a mean over nothing is 0.

    Args:
        labels: (N,). token_weights: (N,) or None. num_items: in place of the weights' sum, or of the valid tokens.

    Raises:
        TypeError, ValueError: weights that are negative or not finite; a denominator that is not positive.
    """
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items needs reduction='mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        check_dense("num_items", num_items)
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor of shape {tuple(num_items.shape)}")
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items must be a real number, got a tensor of {num_items.dtype}")
        if num_items.requires_grad:
            raise ValueError("num_items must be a constant, got a tensor that requires grad; detach it")
    elif num_items is not None:
        if isinstance(num_items, bool) or not isinstance(num_items, Real):
            raise TypeError(f"num_items must be a positive number or a tensor, got {num_items!r}")
        if not LEAST <= num_items <= MOST:
            raise ValueError(f"num_items must be positive, {_DENOMINATOR}, got {num_items!r}")
    given = num_items if isinstance(num_items, Tensor) else None
    averaged = reduction == "mean" and (num_items is None or given is not None)
    weights, scale = None, torch.ones((), dtype=torch.float32, device=device)
    if token_weights is not None or (averaged and given is not None):
        found, scale = torch.ops.fused_kd.amounts(
            labels, token_weights, given, ignore_index, averaged, validate, device
        )
        weights = None if token_weights is None else found
    elif averaged:
        count = (labels != ignore_index).sum().to(device, torch.float32, non_blocking=True)
        scale = (1.0 / count).masked_fill(count == 0, 0.0)
    if num_items is not None and given is None:
        scale = torch.full((), 1.0 / float(num_items), dtype=torch.float32, device=device)
    return weights, scale


def _amounts(
    labels: Tensor,
    weights: Tensor | None,
    num_items: Tensor | None,
    ignore_index: int,
    averaged: bool,
    validate: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    def free(*tensors: Tensor) -> bool:
        return validate or all(x.device.type == "cpu" for x in tensors)

    valid = labels != ignore_index
    if weights is not None:
        looked_at = free(labels, weights)
        if looked_at:
            _check_weights(weights.float(), valid.to(weights.device))
        weights = weights.to(device, torch.float32, non_blocking=True)
        fits = (weights >= 0) & (weights < math.inf)
        weights = weights.masked_fill(~fits, math.nan).masked_fill(~valid.to(device, non_blocking=True), 0.0)
    if not averaged:
        scale = torch.ones((), dtype=torch.float32, device=device)
    else:
        if num_items is not None:
            total, looked_at = num_items.reshape(()), free(labels, num_items)
        else:
            assert weights is not None
            total = weights.sum()
        count = total.to(device, torch.float32, non_blocking=True)
        nothing = count == 0
        if num_items is not None:
            nothing &= ~valid.any().to(device, non_blocking=True)
        fits = (count >= LEAST) & (count <= MOST)
        if looked_at and not bool(fits | nothing):
            name = "token_weights of the valid tokens must add up to 0 or" if num_items is None else "num_items must be"
            raise ValueError(f"{name} {_DENOMINATOR}, got {total.item()}")
        scale = (1.0 / count).masked_fill(~fits, math.nan).masked_fill(nothing, 0.0)
    return labels.new_empty(0, dtype=torch.float32, device=device) if weights is None else weights, scale


def _check_weights(weights: Tensor, valid: Tensor) -> None:
    bad = valid & ~((weights >= 0) & (weights < math.inf))
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        raise ValueError(
            f"token_weights must be finite and at least 0, got {float(weights[token])} at token {token} "
            "(of the flattened labels)"
        )


def _amounts_fake(
    labels: Tensor, weights: Tensor | None, num_items: Tensor | None, *others: object
) -> tuple[Tensor, Tensor]:
    device = others[-1]
    shape = (0,) if weights is None else weights.shape
    empty = torch.empty
    return empty(shape, dtype=torch.float32, device=device), empty((), dtype=torch.float32, device=device)  # type: ignore[call-overload]


_library = torch.library.Library("fused_kd", "FRAGMENT")
_library.define(
    "amounts(Tensor labels, Tensor? token_weights, Tensor? num_items, int ignore_index, bool averaged, bool validate, "
    "Device device) -> (Tensor weights, Tensor scale)"
)
_library.impl("amounts", _amounts, "CompositeExplicitAutograd")
torch.library.register_fake("fused_kd::amounts", _amounts_fake, lib=_library)
