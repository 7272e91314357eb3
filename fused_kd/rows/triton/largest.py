"""The k largest logits of rows, see :mod:`fused_kd.rows.largest`, in Triton: one kernel, a program per row.

The list is held in registers as keys, which order its entries. Only a block with a logit above the smallest of them
looks further: its largest logit and that entry change places until there is none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..contract import LONGEST_IN_TRITON, Leading, Logits
from .blocks import student_block
from .math import COLDEST, EXCLUDED, LOG2_E, OUTSIDE, exponent
from .row import guard, pack_of, shape_of, warp_size
from .sweeps import add_exponentials, by_lane

# Above every key.
NO_ENTRY = tl.constexpr((1 << 63) - 1)
INDICES = tl.constexpr((1 << 32) - 1)


def take(logits: Logits, first: int, so_far: Leading, temperature: Tensor) -> None:
    """As :func:`fused_kd.rows.largest.take`. Launches one kernel on the current stream and never synchronises."""
    (C, W), k = logits.raw.shape, so_far.values.shape[1]
    if k > LONGEST_IN_TRITON:
        raise ValueError(f"k must be at most {LONGEST_IN_TRITON} with backend='triton', got {k}; use backend='torch'")
    block_k = triton.next_power_of_2(max(k, 1))
    # Few threads: each exchange is a reduction among them. Long lists need more to hold them.
    warps = max(1, block_k // 256) if k else 2
    lanes, block = warps * warp_size(), 512 * min(warps, 2)
    with guard(logits.raw.device):
        largest_kernel[(C,)](
            logits.raw,
            temperature,
            *so_far,
            k,
            W,
            first,
            logits.raw.stride(0),
            0 if len(temperature) == 1 else 1,
            *shape_of(logits),
            BLOCK_K=block_k if k else 0,
            BLOCK=block,
            LANES=lanes,
            PACK=pack_of(block // lanes, logits.raw),
            num_warps=warps,
        )


@triton.jit(do_not_specialize=["first", "temperature_stride"])
def largest_kernel(
    raw_ptr,  # (C, W)
    temperature_ptr,  # (1,) or (C,)
    values_ptr,  # (C, k) and so on, of Leading
    indices_ptr,
    top_ptr,
    total_ptr,
    k,
    W,
    first,  # the vocabulary id of column 0
    raw_stride,
    temperature_stride,  # 0, or from row to row
    scale,
    cap,
    BLOCK_K: tl.constexpr,  # 0: no list
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    side = (raw_ptr + row * raw_stride, scale, cap)
    by = tl.minimum(1.0 / tl.load(temperature_ptr + row * temperature_stride), COLDEST) * LOG2_E
    top = tl.full((LANES,), OUTSIDE, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    keys = tl.full((1,), NO_ENTRY, tl.int64)
    listed = 0
    if BLOCK_K:
        lanes = tl.arange(0, BLOCK_K)
        entries = row * k + lanes
        values = tl.load(values_ptr + entries, mask=lanes < k, other=0.0)
        keys = _keys(values, tl.load(indices_ptr + entries, mask=lanes < k, other=0), lanes, k)
        if tl.max(tl.where(lanes < k, values, -float("inf")), axis=0) == -float("inf"):
            # An empty list begins as the first columns, which spares k exchanges.
            listed = tl.minimum(k, W)
            z, _slope, _offsets = student_block(side, 0, listed, BLOCK_K)
            keys = _keys(tl.where(z == z, z, OUTSIDE), (first + lanes).to(tl.int64), lanes, k)
            # NaN is not listed
            total += tl.sum(tl.where((z == z) | (lanes >= listed), 0.0, z), axis=0)
    whole = W // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        top, total, keys = _take(side, start, None, listed, first, by, top, total, keys, BLOCK_K, BLOCK, LANES, PACK)
    if whole < W:
        top, total, keys = _take(side, whole, W, listed, first, by, top, total, keys, BLOCK_K, BLOCK, LANES, PACK)
    before = tl.maximum(tl.load(top_ptr + row), OUTSIDE)
    highest = tl.maximum(tl.max(top, axis=0), before)
    sum_before = tl.load(total_ptr + row) * tl.exp2(exponent(before, by, highest))
    sum_now = sum_before + tl.sum(total * tl.exp2(exponent(top, by, highest)), axis=0)
    none = (highest < EXCLUDED) & (sum_now == sum_now)  # excluded tokens are nothing
    tl.store(top_ptr + row, tl.where(highest < EXCLUDED, -float("inf"), highest))
    tl.store(total_ptr + row, tl.where(none, 0.0, sum_now))
    if BLOCK_K:
        values = _values(keys)
        some = values >= EXCLUDED
        tl.store(values_ptr + entries, tl.where(some, values, -float("inf")), mask=lanes < k)
        tl.store(indices_ptr + entries, tl.where(some, INDICES - (keys & INDICES), 0), mask=lanes < k)


@triton.jit
def _take(
    side,
    start,
    end,
    listed,  # columns that are in the list already
    first,
    by,
    top,
    total,
    keys,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    """A block's share in the lanes' maxima and sums, and in the list."""
    z, _slope, offsets = student_block(side, start, end, BLOCK)
    z = tl.where(z < EXCLUDED, OUTSIDE, z)
    if BLOCK_K:
        z = tl.where(offsets < listed, OUTSIDE, z)
        least = tl.min(keys, axis=0)
        largest = tl.max(z, axis=0)
        while largest > _values(least):
            column = tl.min(tl.where(z == largest, offsets, start + BLOCK), axis=0)
            z = tl.where(offsets == column, _values(least), z)
            keys = tl.where(keys == least, _key(largest, (first + column).to(tl.int64)), keys)
            least = tl.min(keys, axis=0)
            largest = tl.max(z, axis=0)
    top, total = add_exponentials(by_lane(z, LANES, PACK), by, top, total)
    return top, total, keys


@triton.jit
def _keys(values, indices, lanes, k):
    """Of a list's entries; different ones where there is none yet, and :data:`NO_ENTRY` beyond k."""
    some = values >= EXCLUDED
    keys = _key(tl.where(some, values, OUTSIDE), tl.where(some, indices, lanes.to(tl.int64)))
    return tl.where(lanes < k, keys, NO_ENTRY)


@triton.jit
def _key(value, index):
    """int64 in the order of values and, where these are equal, in the inverse one of indices."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # 0.0: -0.0 equals it
    return (_ordered(bits).to(tl.int64) << 32) | (INDICES - index)


@triton.jit
def _values(keys):
    return _ordered((keys >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _ordered(bits):
    """Integers in the order of the floats that these are the bits of, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
