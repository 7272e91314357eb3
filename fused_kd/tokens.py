"""What each token counts: its label as the engines take it, its weight, and one over the denominator of a mean.

Values are looked at where that is free (tensors on the CPU) or asked for (``validate``), inside an opaque op, as
``torch.compile`` cannot follow a look.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .checks import check_dense
from .engines.problem import IGNORED, INVALID, Side
from .rows.top_k import OF_LIST_ALONE, out_of_range

# One over a denominator must be a normal fp32 number too.
LEAST, MOST = 1e-37, 1e37
_DENOMINATOR = f"a number in [{LEAST:g}, {MOST:g}]"


def labels_weights_scale(
    labels: Tensor,
    token_weights: Tensor | None,
    num_items: float | Tensor | None,
    *,
    vocab: int,
    ignore_index: int,
    reduction: str,
    validate: bool,
    signed: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Labels as of :class:`.engines.problem.Problem`, token weights (N,) fp32 on the device, 0 for ignored tokens, and
    the factor of their sum, a 0-d tensor.

    Weights and denominators that are out of range are NaN where they are not looked at. The factor of a mean over
    nothing is 0. ``signed`` weights may be negative, and a mean is then over the tokens, not over their weights.

    Args:
        labels: (N,) int64. token_weights: (N,) or None. num_items: in place of the weights' sum, or of the valid
            tokens.

    Raises:
        TypeError, ValueError: labels outside [0, vocab) that are not ``ignore_index``; weights that are not
            finite or, unless signed, negative; a denominator that is not positive.
    """
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items needs reduction='mean', got reduction={reduction!r}")
    items, number = None, None
    if isinstance(num_items, Tensor):
        items = num_items
        check_dense("num_items", items)
        if items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor of shape {tuple(items.shape)}")
        if items.dtype == torch.bool or items.is_complex():
            raise TypeError(f"num_items must be a real number, got a tensor of {items.dtype}")
        if items.requires_grad:
            raise ValueError("num_items must be a constant, got a tensor that requires grad; detach it")
    elif num_items is not None:
        number = num_items
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"num_items must be a positive number or a tensor, got {number!r}")
        if not LEAST <= number <= MOST:
            raise ValueError(f"num_items must be positive, {_DENOMINATOR}, got {number!r}")
    averaged = reduction == "mean" and number is None
    labels, weights, scale = torch.ops.fused_kd.tokens(
        labels, token_weights, items, vocab, ignore_index, averaged, validate, signed, device
    )
    if number is not None:
        scale = torch.full((), 1.0 / float(number), dtype=torch.float32, device=device)
    return labels, None if token_weights is None else weights, scale


def _tokens(
    labels: Tensor,
    weights: Tensor | None,
    num_items: Tensor | None,
    vocab: int,
    ignore_index: int,
    averaged: bool,
    validate: bool,
    signed: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    def free(*tensors: Tensor) -> bool:
        return validate or all(x.device.type == "cpu" for x in tensors)

    if free(labels):
        check_labels(labels, vocab, ignore_index)
    ignored = labels == ignore_index
    labels = torch.where((labels >= 0) & (labels < vocab), labels, INVALID).masked_fill_(ignored, IGNORED)
    valid, looked_at = labels != IGNORED, False
    if weights is not None:
        looked_at = free(labels, weights)
        if looked_at:
            _check_weights(weights.float(), valid.to(weights.device), signed)
        weights = weights.to(device, torch.float32, non_blocking=True)
        fits = weights.isfinite() & (signed | (weights >= 0))
        weights = weights.masked_fill(~fits, math.nan).masked_fill(~valid.to(device, non_blocking=True), 0.0)
    if not averaged:
        scale = torch.ones((), dtype=torch.float32, device=device)
    else:
        if num_items is not None:
            total, looked_at = num_items.reshape(()), free(labels, num_items)
        else:
            total = valid.sum() if weights is None or signed else weights.sum()
        count = total.to(device, torch.float32, non_blocking=True)
        nothing = count == 0
        if num_items is not None:
            nothing &= ~valid.any().to(device, non_blocking=True)
        fits = (count >= LEAST) & (count <= MOST)
        if looked_at and not bool(fits | nothing):
            name = "token_weights of the valid tokens must add up to 0 or" if num_items is None else "num_items must be"
            raise ValueError(f"{name} {_DENOMINATOR}, got {total.item()}")
        scale = (1.0 / count).masked_fill(~fits, math.nan).masked_fill(nothing, 0.0)
    return labels, labels.new_empty(0, dtype=torch.float32, device=device) if weights is None else weights, scale


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError naming the first label outside [0, vocab) that is not ``ignore_index``; waits for the device."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {vocab}) or ignore_index={ignore_index}, got {int(labels[token])} "
            f"at token {token} (of the flattened labels)"
        )


def _check_weights(weights: Tensor, valid: Tensor, signed: bool) -> None:
    bad = valid & ~(weights.isfinite() & (signed | (weights >= 0)))
    if bool(bad.any()):
        token = int(bad.nonzero()[0])
        allowed = "finite" if signed else "finite and at least 0 (or signed=True)"
        raise ValueError(
            f"token_weights must be {allowed}, got {float(weights[token])} at token {token} (of the flattened labels)"
        )


def check_top_k(teacher: Side, labels: Tensor, vocab: int) -> None:
    """Raise ValueError naming the first malformed list of a valid token; waits for the device."""
    values, indices, tail = teacher.source, teacher.indices, teacher.tail
    assert indices is not None
    valid = (labels != IGNORED).to(values.device).unsqueeze(1)
    listed = (values != -math.inf) & valid
    wrong = listed & out_of_range(values, tail)
    if bool(wrong.any()):
        token, k = wrong.nonzero()[0].tolist()
        allowed = (
            "finite or -inf"
            if tail in OF_LIST_ALONE
            else f"at most 0 and not NaN with tail={tail!r} (logits need 'renormalize' or 'listed')"
        )
        raise ValueError(
            f"log_probs must be {allowed}, got {float(values[token, k])} at token {token} (of the flattened tokens)"
        )
    empty = valid.squeeze(1) & ~listed.any(1)
    if tail in OF_LIST_ALONE and bool(empty.any()):
        raise ValueError(
            f"log_probs must list an entry above -inf with tail={tail!r}, got none at token "
            f"{int(empty.nonzero()[0])} (of the flattened tokens)"
        )
    if teacher.log_rest is not None and tail not in OF_LIST_ALONE:
        beyond = valid.squeeze(1) & out_of_range(teacher.log_rest, tail)
        if bool(beyond.any()):
            token = int(beyond.nonzero()[0])
            raise ValueError(
                f"log_rest must be at most 0 and not NaN, got {float(teacher.log_rest[token])} at token {token} "
                "(of the flattened tokens)"
            )
    outside = listed & ((indices < 0) | (indices >= vocab))
    if bool(outside.any()):
        token, k = outside.nonzero()[0].tolist()
        raise ValueError(
            f"indices must be in [0, {vocab}) where log_probs is not -inf, got {int(indices[token, k])} at token "
            f"{token} (of the flattened tokens)"
        )
    ordered = torch.where(listed, indices.long(), vocab).sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < vocab)
    if bool(twice.any()):
        token, k = twice.nonzero()[0].tolist()
        raise ValueError(
            f"indices of a token must differ, got {int(ordered[token, k])} twice at token {token} "
            "(of the flattened tokens)"
        )


def _tokens_fake(
    labels: Tensor, weights: Tensor | None, num_items: Tensor | None, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    device = others[-1]
    shape = (0,) if weights is None else weights.shape
    empty = torch.empty
    return (
        torch.empty_like(labels),
        empty(shape, dtype=torch.float32, device=device),  # type: ignore[call-overload]
        empty((), dtype=torch.float32, device=device),  # type: ignore[call-overload]
    )


_library = torch.library.Library("fused_kd", "FRAGMENT")
_library.define(
    "tokens(Tensor labels, Tensor? token_weights, Tensor? num_items, int vocab, int ignore_index, bool averaged, "
    "bool validate, bool signed, Device device) -> (Tensor labels_, Tensor weights, Tensor scale)"
)
_library.impl("tokens", _tokens, "CompositeExplicitAutograd")
torch.library.register_fake("fused_kd::tokens", _tokens_fake, lib=_library)
