"""Triton sweeps of :mod:`fused_kd.rows.top_k`: two kernels, a program per row.

Entries are ascending, so that a block of the vocabulary finds its own between two counts, and compares itself with
each of them: K + 1 comparisons of a block in a sweep, not of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .base import LOG_ZERO, RowInputs, RowOutputs, Sparse
from .top_k import DenseRow, categories, category_rows
from .triton_row import BLOCK, THREADS, guard, unit_stride, warp_size
from .triton_sweeps import logits, logits_and_slope

_LOG_ZERO = tl.constexpr(LOG_ZERO)


def row(dense: DenseRow, inputs: RowInputs, outputs: RowOutputs) -> None:
    """Fill ``outputs`` for one chunk; shapes and meaning as in :func:`fused_kd.rows.top_k.row`."""
    teacher, student, C = inputs.teacher, inputs.student, len(inputs.labels)
    assert isinstance(teacher, Sparse)
    if C == 0:
        return
    if teacher.tail == "uniform":
        dense(inputs, outputs)
        return
    V, K1 = student.raw.shape[1], teacher.indices.shape[1]
    small = categories(teacher, inputs.labels)
    raw, labels = unit_stride(student.raw), inputs.labels.contiguous()
    origin = torch.empty(C, device=labels.device)
    cold_rest = torch.empty_like(origin) if inputs.cold_labels else None
    common = {
        "K1": K1,
        "V": V,
        "student_stride": raw.stride(0),
        "student_scale": student.scale,
        "student_cap": student.softcap,
        "COLD": inputs.cold_labels,
        "BLOCK": BLOCK // 2,
        "BLOCK_K": triton.next_power_of_2(K1),
        "num_warps": THREADS // warp_size(),
    }
    with guard(labels.device):
        condense_kernel[(C,)](
            raw, labels, teacher.indices, inputs.scalars, small.student, origin, cold_rest, **common
        )  # fmt: skip
        gradient = category_rows(dense, inputs, outputs, small, cold_rest)
        if gradient is None or outputs.dlogits is None:
            return
        out = outputs.dlogits
        dlogits = raw if out is student.raw else unit_stride(out)
        expand_kernel[(C,)](
            raw, labels, teacher.indices, inputs.scalars, small.student, origin, cold_rest,
            *(None if x is None else x.contiguous() for x in gradient), dlogits, dlogits.stride(0),
            **common,
        )  # fmt: skip
        if dlogits is not out:
            out.copy_(dlogits)


@triton.jit
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
    student_scale,
    student_cap,
    COLD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(scalars_ptr + 3)
    inv_T = 1.0 / temperature
    student_row = student_ptr + row * student_stride
    indices_row = indices_ptr + row * K1
    lanes_k = tl.arange(0, BLOCK_K)
    entries = tl.load(indices_row + lanes_k, mask=lanes_k < K1, other=V).to(tl.int32)
    top = tl.cast(_LOG_ZERO, tl.float32)
    z_sum = tl.zeros((BLOCK,), tl.float32)
    cold_sum = tl.zeros((BLOCK,), tl.float32)
    first = 0
    if tl.load(labels_ptr + row) >= 0:
        for start in range(0, V, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            z = logits(student_row, offsets, offsets < V, student_scale, student_cap)
            last = tl.sum((entries < tl.minimum(start + BLOCK, V)).to(tl.int32), axis=0)
            for j in range(first, last):
                z = tl.where(offsets == tl.load(indices_row + j), -float("inf"), z)
            first = last
            new_top = tl.maximum(top, tl.max(z, axis=0))
            if COLD:
                cold_sum = cold_sum * tl.exp(top - new_top) + tl.exp(z - new_top)
            z_sum = z_sum * tl.exp((top - new_top) * inv_T) + tl.exp((z - new_top) * inv_T)
            top = new_top
    # Not before: they would hold registers through the sweep.
    entry_z = logits(student_row, entries, entries < V, student_scale, student_cap)
    origin = tl.maximum(top, tl.max(entry_z, axis=0))
    categories_row = categories_ptr + row * (K1 + 1)
    tl.store(origin_ptr + row, origin)
    entry_z = tl.where(entries < V, entry_z - origin, _LOG_ZERO)
    tl.store(categories_row + lanes_k, entry_z, mask=lanes_k < K1)
    tl.store(categories_row + K1, (top - origin) + tl.log(tl.sum(z_sum, axis=0)) * temperature)
    if COLD:
        tl.store(cold_ptr + row, (top - origin) + tl.log(tl.sum(cold_sum, axis=0)))


@triton.jit
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
    student_scale,
    student_cap,
    COLD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inv_T = 1.0 / tl.load(scalars_ptr + 3)
    student_row = student_ptr + row * student_stride
    indices_row = indices_ptr + row * K1
    lanes_k = tl.arange(0, BLOCK_K)
    entries = tl.load(indices_row + lanes_k, mask=lanes_k < K1, other=V).to(tl.int32)
    origin = tl.load(origin_ptr + row)
    rest = tl.load(categories_ptr + row * (K1 + 1) + K1)
    rest_gradient = tl.load(rest_gradient_ptr + row)
    ignored = tl.load(labels_ptr + row) < 0
    first = 0
    for start in range(0, V, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < V
        z, slope = logits_and_slope(student_row, offsets, mask, student_scale, student_cap)
        # At most 1 on unlisted entries; listed ones, replaced below, must not overflow.
        gradient = rest_gradient * tl.exp(tl.minimum(((z - origin) - rest) * inv_T, 0.0))
        if COLD:
            cold = tl.minimum((z - origin) - tl.load(cold_ptr + row), 0.0)
            gradient += tl.load(cold_gradient_ptr + row) * tl.exp(cold)
        last = tl.sum((entries < tl.minimum(start + BLOCK, V)).to(tl.int32), axis=0)
        for j in range(first, last):
            own = tl.load(entry_gradient_ptr + row * K1 + j)
            gradient = tl.where(offsets == tl.load(indices_row + j), own, gradient)
        first = last
        gradient = tl.where(ignored, 0.0, gradient * slope)
        tl.store(dlogits_ptr + row * dlogits_stride + offsets, gradient, mask=mask)
