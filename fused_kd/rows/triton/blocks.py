"""Loads and stores of a block of a row's logits.

``student`` is (row pointer, scale or None, softcap or None); ``teacher`` the same, then the entries, the rest, the row
and K of a sparse one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import LOG_ZERO, OUTSIDE, final_logits, first_entry


@triton.jit
def student_block(student, start, end, BLOCK: tl.constexpr):
    """Final fp32 logits of a block before the temperature, ``OUTSIDE`` from ``end`` on; d final / d raw; columns.

    No ``end`` says that the row has the whole block."""
    row_ptr, scale, cap = student
    offsets = start + tl.arange(0, BLOCK)
    if end is None:
        z, slope = final_logits(tl.load(row_ptr + offsets).to(tl.float32), scale, cap)
    else:
        z, slope = logits_and_slope(row_ptr, offsets, offsets < end, scale, cap)
    return z, slope, offsets


@triton.jit
def teacher_block(teacher, start, offsets, end, BLOCK: tl.constexpr):
    """As :func:`student_block`, the logits; a sparse teacher's are made here: one value, and its entries in this
    block."""
    row_ptr, scale, cap, entries_ptr, rest_ptr, row, K = teacher
    if entries_ptr is None:
        if end is None:
            z, _slope = final_logits(tl.load(row_ptr + offsets).to(tl.float32), scale, cap)
        else:
            z = logits(row_ptr, offsets, offsets < end, scale, cap)
    else:
        entries = entries_ptr + row * K
        z = tl.zeros((BLOCK,), tl.float32) + tl.maximum(tl.load(rest_ptr + row), LOG_ZERO)
        for j in range(first_entry(entries, K, start), first_entry(entries, K, start + BLOCK)):
            own = tl.maximum(tl.load(row_ptr + j), LOG_ZERO)
            z = tl.where(offsets == tl.load(entries + j), own, z)
        if end is not None:
            z = tl.where(offsets < end, z, OUTSIDE)
    return z


@triton.jit
def logits(row_ptr, offsets, mask, scale, cap):
    """Final fp32 logits before the temperature; ``OUTSIDE`` where masked."""
    z, _slope = logits_and_slope(row_ptr, offsets, mask, scale, cap)
    return z


@triton.jit
def logits_and_slope(row_ptr, offsets, mask, scale, cap):
    """As :func:`logits`, and d final / d raw."""
    z = tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    z, slope = final_logits(z, scale, cap)
    return tl.where(mask, z, OUTSIDE), slope


@triton.jit
def store_block(row_ptr, offsets, end, values):
    if end is None:
        tl.store(row_ptr + offsets, values)
    else:
        tl.store(row_ptr + offsets, values, mask=offsets < end)


@triton.jit
def fill(row_ptr, V, value, BLOCK: tl.constexpr):
    values = tl.full((BLOCK,), value, tl.float32)
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        store_block(row_ptr, start + tl.arange(0, BLOCK), None, values)
    if whole < V:
        store_block(row_ptr, whole + tl.arange(0, BLOCK), V, values)
