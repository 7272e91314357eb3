"""A teacher's share in a mixture, see :mod:`fused_kd.rows.mixing`, in Triton: one kernel, a program per row.

Two sweeps: the sum of the row's exponentials; then its log-probabilities, added to what is there. Bytes an element of
fp32 logits: 12 for the first teacher, 16 for another.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..contract import Logits
from .blocks import fill, store_block, student_block
from .math import COLDEST, EXCLUDED, LOG2_E, exponent, log_positive
from .row import guard, launch_constants, shape_of
from .sweeps import sweep_student


def add(mixed: Tensor, logits: Logits, log_share: Tensor, temperature: Tensor, *, first: bool) -> None:
    """As :func:`fused_kd.rows.mixing.add`. Launches one kernel on the current stream and never synchronises."""
    C, V = mixed.shape
    with guard(mixed.device):
        mixing_kernel[(C,)](
            logits.raw,
            mixed,
            log_share,
            temperature,
            V,
            logits.raw.stride(0),
            mixed.stride(0),
            0 if len(log_share) == 1 else 1,
            0 if len(temperature) == 1 else 1,
            *shape_of(logits),
            FIRST=first,
            **launch_constants(logits.softcap is not None, logits.raw, dlogits=mixed),
        )


@triton.jit(do_not_specialize=["share_stride", "temperature_stride"])
def mixing_kernel(
    raw_ptr,  # (C, V)
    mixed_ptr,  # (C, V), may be the same where FIRST
    share_ptr,  # (1,) or (C,)
    temperature_ptr,  # (1,) or (C,)
    V,
    raw_stride,
    mixed_stride,
    share_stride,  # 0, or from row to row
    temperature_stride,
    scale,
    cap,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mixed = mixed_ptr + row * mixed_stride
    share = tl.load(share_ptr + row * share_stride)
    if share == -float("inf"):
        if FIRST:
            fill(mixed, V, -float("inf"), BLOCK)
        return
    side = (raw_ptr + row * raw_stride, scale, cap)
    T = tl.load(temperature_ptr + row * temperature_stride)
    k = tl.minimum(1.0 / T, COLDEST) * LOG2_E
    top, total, _product = sweep_student(side, V, k, False, BLOCK, LANES, PACK)
    # Of a row that excludes all tokens NaN.
    norm = tl.where(top < EXCLUDED, float("nan"), T * (share - tl.log(total)))
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _add(mixed, side, start, None, top, norm, T, k, FIRST, BLOCK)
    if whole < V:
        _add(mixed, side, whole, V, top, norm, T, k, FIRST, BLOCK)


@triton.jit
def _add(mixed, side, start, end, top, norm, T, k, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    z, _slope, offsets = student_block(side, start, end, BLOCK)
    new = tl.where(z < EXCLUDED, -float("inf"), z - top) + norm
    if not FIRST:
        if end is None:
            before = tl.load(mixed + offsets)
        else:
            before = tl.load(mixed + offsets, mask=offsets < end, other=0.0)
        # Comparisons that leave NaN where it is.
        high = tl.where(before > new, before, new)
        low = tl.where(before > new, new, before)
        step = exponent(low, k, tl.where(high == -float("inf"), 0.0, high))
        new = high + T * log_positive(1.0 + tl.exp2(step))
    store_block(mixed, offsets, end, new)
