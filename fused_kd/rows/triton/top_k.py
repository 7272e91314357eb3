"""Triton sweeps of :mod:`fused_kd.rows.top_k`: two kernels, a program per row.

Entries are ascending, so that a block of the vocabulary takes them from where the one before has stopped, and compares
itself with each of its own: K + 1 comparisons of a block in a sweep, not of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contract import RowInputs, RowOutputs, Sparse, compiled, scalars_stride
from ..top_k import categories, category_rows
from .blocks import fill, logits, store_block, student_block
from .math import LOG2_E, LOG_ZERO, TEMPERATURE, exponent, exponent_scale
from .row import guard, launch_constants, shape_of
from .row import row as dense
from .sweeps import add_exponentials, by_lane


@compiled
def row(inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk, as :mod:`fused_kd.rows.contract` says, of a teacher's lists without a uniform
    tail."""
    teacher, student, dlogits = inputs.teacher, inputs.student, outputs.dlogits
    assert isinstance(teacher, Sparse)
    (C, V), K1 = student.raw.shape, teacher.indices.shape[1]
    small = categories(inputs)
    scale, cap = shape_of(student)
    origin = torch.empty(C, dtype=torch.float32, device=inputs.labels.device)
    cold_rest = torch.empty_like(origin) if inputs.cold_labels else None
    lists = (student.raw, inputs.labels, teacher.indices, inputs.scalars, small.student, origin, cold_rest)
    common = {
        "K1": K1,
        "V": V,
        "student_stride": student.raw.stride(0),
        "scalars_stride": scalars_stride(inputs.scalars),
        "student_scale": scale,
        "student_cap": cap,
        "COLD": inputs.cold_labels,
        "BLOCK_K": triton.next_power_of_2(K1),
    } | launch_constants(True, student.raw)
    with guard(inputs.labels.device):
        condense_kernel[(C,)](*lists, **common)
        gradient = category_rows(dense, inputs, outputs, small, cold_rest)
        if gradient is None or dlogits is None:
            return
        parts = (None if x is None else x.contiguous() for x in gradient)
        expand_kernel[(C,)](*lists, *parts, dlogits, dlogits.stride(0), **common)


@triton.jit(do_not_specialize=["scalars_stride"])
def condense_kernel(
    student_ptr,  # (C, V) raw logits
    labels_ptr,  # (C,)
    indices_ptr,  # (C, K1) ascending, V where there is no entry
    scalars_ptr,
    categories_ptr,  # (C, K1 + 1): the entries' final logits, and the rest's log-sum-exp times the temperature
    origin_ptr,  # (C,) the largest logit; the others are relative to it, lest a common offset swallow their digits
    cold_ptr,  # (C,) the rest's log-sum-exp at temperature 1, or None
    K1,
    V,
    student_stride,
    scalars_stride,
    student_scale,
    student_cap,
    COLD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scalars = scalars_ptr + row * scalars_stride
    temperature = tl.load(scalars + TEMPERATURE)
    student_row = student_ptr + row * student_stride
    indices_row = indices_ptr + row * K1
    lanes_k = tl.arange(0, BLOCK_K)
    entries = tl.load(indices_row + lanes_k, mask=lanes_k < K1, other=V).to(tl.int32)
    k = exponent_scale(scalars)
    top = tl.full((LANES,), LOG_ZERO, tl.float32)
    z_sum = tl.zeros((LANES,), tl.float32)
    cold_sum = tl.zeros((LANES,), tl.float32)
    student = (student_row, student_scale, student_cap)
    if tl.load(labels_ptr + row) >= 0:
        first = 0
        whole = V // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            z, first = _rest(student, indices_row, start, None, first, K1, V, BLOCK, LANES, PACK)
            if COLD:
                _new, cold_sum = add_exponentials(z, LOG2_E, top, cold_sum)
            top, z_sum = add_exponentials(z, k, top, z_sum)
        if whole < V:
            z, first = _rest(student, indices_row, whole, V, first, K1, V, BLOCK, LANES, PACK)
            if COLD:
                _new, cold_sum = add_exponentials(z, LOG2_E, top, cold_sum)
            top, z_sum = add_exponentials(z, k, top, z_sum)
    # Not before: they would hold registers through the sweep.
    entry_z = logits(student_row, entries, entries < V, student_scale, student_cap)
    rest = tl.max(top, axis=0)
    origin = tl.maximum(rest, tl.max(entry_z, axis=0))
    categories_row = categories_ptr + row * (K1 + 1)
    tl.store(origin_ptr + row, origin)
    entry_z = tl.where(entries < V, entry_z - origin, LOG_ZERO)
    tl.store(categories_row + lanes_k, entry_z, mask=lanes_k < K1)
    tl.store(categories_row + K1, (rest - origin) + _log_sum(rest, k, top, z_sum) * temperature)
    if COLD:
        tl.store(cold_ptr + row, (rest - origin) + _log_sum(rest, LOG2_E, top, cold_sum))


@triton.jit
def _rest(student, indices_row, start, end, first, K1, V, BLOCK: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr):
    """A block's logits, -inf where listed, as :func:`fused_kd.rows.triton.sweeps.by_lane`; and the next entry."""
    z, _slope, offsets = student_block(student, start, end, BLOCK)
    entry = _entry(indices_row, first, K1, V)
    while entry < tl.minimum(start + BLOCK, V):
        z = tl.where(offsets == entry, -float("inf"), z)
        first += 1
        entry = _entry(indices_row, first, K1, V)
    return by_lane(z, LANES, PACK), first


@triton.jit
def _entry(indices_row, i, K1, V):
    return tl.load(indices_row + i, mask=i < K1, other=V).to(tl.int32)


@triton.jit
def _log_sum(top, k, z_max, z_sum):
    """The logarithm of the lanes' sums together, over the largest logit."""
    return tl.log(tl.sum(z_sum * tl.exp2(exponent(z_max, k, top)), axis=0))


@triton.jit(do_not_specialize=["scalars_stride"])
def expand_kernel(
    student_ptr,
    labels_ptr,
    indices_ptr,
    scalars_ptr,
    categories_ptr,
    origin_ptr,
    cold_ptr,
    entry_gradient_ptr,  # (C, K1)
    rest_gradient_ptr,  # (C,)
    cold_gradient_ptr,  # (C,) or None
    dlogits_ptr,  # (C, V); may be student_ptr
    dlogits_stride,
    K1,
    V,
    student_stride,
    scalars_stride,
    student_scale,
    student_cap,
    COLD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = exponent_scale(scalars_ptr + row * scalars_stride)
    student = (student_ptr + row * student_stride, student_scale, student_cap)
    dlogits_row = dlogits_ptr + row * dlogits_stride
    if tl.load(labels_ptr + row) < 0:
        fill(dlogits_row, V, 0.0, BLOCK)
        return
    origin = tl.load(origin_ptr + row)
    rest = tl.load(categories_ptr + row * (K1 + 1) + K1)
    rest_gradient = tl.load(rest_gradient_ptr + row)
    entries = (indices_ptr + row * K1, entry_gradient_ptr + row * K1)
    cold = (0.0, 0.0)
    if COLD:
        cold = (tl.load(cold_ptr + row), tl.load(cold_gradient_ptr + row))
    first = 0
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        first = _expand(
            student, entries, dlogits_row, start, None, first, K1, V, origin, k, rest, rest_gradient, cold, COLD, BLOCK
        )
    if whole < V:
        _expand(
            student, entries, dlogits_row, whole, V, first, K1, V, origin, k, rest, rest_gradient, cold, COLD, BLOCK
        )


@triton.jit
def _expand(
    student,
    entries,
    dlogits_row,
    start,
    end,
    first,
    K1,
    V,
    origin,
    k,
    rest,
    rest_gradient,
    cold,
    COLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a block's gradient; the next entry."""
    indices_row, entry_gradient = entries
    z, slope, offsets = student_block(student, start, end, BLOCK)
    # At most 1 on unlisted entries; listed ones, replaced below, must not overflow.
    gradient = rest_gradient * tl.exp2(tl.minimum(((z - origin) - rest) * k, 0.0))
    if COLD:
        cold_rest, cold_gradient = cold
        gradient += cold_gradient * tl.exp2(tl.minimum(((z - origin) - cold_rest) * LOG2_E, 0.0))
    entry = _entry(indices_row, first, K1, V)
    while entry < tl.minimum(start + BLOCK, V):
        gradient = tl.where(offsets == entry, tl.load(entry_gradient + first), gradient)
        first += 1
        entry = _entry(indices_row, first, K1, V)
    store_block(dlogits_row, offsets, end, gradient * slope)
    return first
