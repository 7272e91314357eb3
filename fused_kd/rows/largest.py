"""The k largest logits of each row and the sum of exponentials of all others, slab by slab of the vocabulary.

An element is listed or counted in the sum: one that leaves the list is added to the sum, so that nothing is ever
subtracted and the mass of what is not listed keeps its digits however small it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Leading, Logits, check_per_row, unit_stride
from .select import without_cuda


def take(logits: Logits, first: int, so_far: Leading, temperature: Tensor, backend: str) -> None:
    """Read a slab of columns (C, W) whose first one is vocabulary id ``first``, and update ``so_far`` in place.

    Of equal logits the lower id is listed, if slabs come in ascending order. Logits of -inf (excluded tokens, see
    ``docs/excluded_tokens.md``) are neither listed nor counted. A NaN is not listed and makes the row's ``total`` NaN.

    Args:
        logits: (C, W).
        first: vocabulary id of the first column, below 2**32 - W.
        so_far: of the columns read before; k = 0 makes it the sum of exponentials alone. With Triton k is at most
            :data:`fused_kd.rows.contract.LONGEST_IN_TRITON`.
        temperature: (1,) or (C,) fp32 on the logits' device. It divides the exponents alone: ``values`` and ``top`` are
            logits.
        backend: from :func:`fused_kd.rows.select.choose_backend`. "cuda" has no kernel of its own for this and uses
            Triton's.

    Raises:
        ValueError: for ``so_far`` or ``temperature`` that do not fit, a list that is too long for Triton, and "native"
            where it cannot be compiled.
    """
    C, W = logits.raw.shape
    _check(C, so_far, temperature)
    if C == 0 or W == 0:
        return
    chosen = without_cuda(backend)
    if chosen == "triton":
        from .triton.largest import take as implementation
    elif chosen == "native":
        from .native.largest import take as implementation
    else:
        from .torch.largest import take as implementation
    implementation(logits._replace(raw=unit_stride(logits.raw)), first, so_far, temperature)


def _check(C: int, so_far: Leading, temperature: Tensor) -> None:
    k = so_far.values.shape[-1]
    shapes = {"values": (C, k), "indices": (C, k), "top": (C,), "total": (C,)}
    for name, tensor in so_far._asdict().items():
        dtype = torch.int64 if name == "indices" else torch.float32
        if tensor.shape != shapes[name] or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"so_far.{name} must be contiguous, {dtype} and of shape {shapes[name]}, got {tensor.dtype}, "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    check_per_row("temperature", temperature, C)
