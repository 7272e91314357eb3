"""Triton kernels of the streaming engine's backward: tiles of dlogits, and products that skip tiles of zeros."""

from __future__ import annotations

import triton
import triton.language as tl

from ...rows.triton.gradient import tabled_gradient
from ...rows.triton.math import LOG2_E, exponent, exponent_scale
from ...rows.triton.shares import linear
from ...rows.triton.terms import COLD, SUMS_P, SUMS_Y, Z
from .kernels import row_factors, row_norms, row_own, row_scalars, row_targets
from .tiles import placed, tile


@triton.jit(do_not_specialize=["first_position", "last_position", "n", "scalars_stride"])
def gradient_kernel(
    student,
    teacher,  # None without TEACHER
    tokens_ptr,
    labels_ptr,
    count_ptr,
    norms_ptr,
    weights_ptr,  # (n,) by position, or None
    scalars_ptr,
    scalars_stride,
    out_ptr,  # dlogits of the slab; zeros where a tile is filtered
    out_stride,
    flags_ptr,  # (blocks of the chunk, tiles of the slab) whether a tile is not filtered, or None
    threshold,  # tiles without an entry of this size are filtered, where flags are asked for
    first_position,
    last_position,
    first_column,
    last_column,
    n,
    V,
    TEACHER: tl.constexpr,
    BY_TOKEN: tl.constexpr,  # a row of ``out`` is a token; else a position, from first_position
    PER_TOKEN: tl.constexpr,
    TABLED: tl.constexpr,
    ROW: tl.constexpr,
    EXCLUDES: tl.constexpr,
    ROUND_S: tl.constexpr,
    ROUND_T: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of the gradient of fused_kd.rows.shares, times d final / d raw and the row's weight."""
    count = tl.load(count_ptr)
    block, part = placed(GROUP)
    first = first_position + block * BM
    positions = first + tl.arange(0, BM)
    start = first_column + part * BN
    columns = start + tl.arange(0, BN)
    valid = positions < tl.minimum(count, last_position)
    held = tl.minimum(positions, tl.maximum(count, 1) - 1)
    tokens = tl.load(tokens_ptr + held)
    gradient = tl.zeros((BM, BN), tl.float32)
    if first < count:
        labels = tl.load(labels_ptr + held).to(tl.int32)
        at_label = columns[None, :] == labels[:, None]
        z_s, slope = tile(student, tokens, start, V, ROUND_S, UPCAST, BM, BN, BK)
        if not TEACHER:
            factors = row_factors(norms_ptr, held, n)
            s_max = tl.load(norms_ptr + held)[:, None]
            gradient = tl.exp2(exponent(z_s, LOG2_E, s_max)) * factors[4] - tl.where(at_label, factors[5], 0.0)
        else:
            z_t, _slope_t = tile(teacher, tokens, start, V, ROUND_T, UPCAST, BM, BN, BK)
            norms = row_norms(norms_ptr, held, n)
            scalars = row_scalars(scalars_ptr, scalars_stride, tokens, PER_TOKEN)
            # The terms' own first: what is linear holds fewer registers meanwhile.
            if len(TABLED) > 0:
                targets = row_targets(norms_ptr, scalars, held, n, TABLED)
                own = row_own(norms_ptr, held, n, TABLED)
                gradient = tabled_gradient(z_s, z_t, at_label, targets, norms, own, True, TABLED, EXCLUDES)
            if ROW[SUMS_P] or ROW[SUMS_Y] or ROW[COLD] or ROW[Z]:
                factors = row_factors(norms_ptr, held, n)
                k = exponent_scale(scalars)
                more = linear(z_s, z_t, at_label, k, norms, norms[0], factors, ROW[SUMS_P], ROW[SUMS_Y], ROW)
                if len(TABLED) > 0:
                    gradient += more
                else:
                    gradient = more
        gradient = tl.where(valid[:, None], gradient * slope, 0.0)
    # Places are worked out here, not before the products, which need the registers.
    if BY_TOKEN:
        rows = tokens.to(tl.int64)
        stored = valid
    else:
        rows = (positions - first_position).to(tl.int64)
        stored = positions < last_position
    out = out_ptr + rows[:, None] * out_stride + (columns - first_column)[None, :]
    stored = stored[:, None] & (columns < last_column)[None, :]
    if flags_ptr is not None:
        # Compared so that a NaN, too, keeps its tile.
        kept = stored & ~(tl.abs(gradient) < threshold)
        flag = tl.max(kept.to(tl.int32))
        gradient = tl.where(flag > 0, gradient, 0.0)
        tl.store(flags_ptr + block * tl.num_programs(1) + part, flag)
    if weights_ptr is not None:
        gradient *= tl.load(weights_ptr + held, mask=valid, other=0.0)[:, None]
    tl.store(out, gradient, mask=stored)


@triton.jit
def flagged_product_kernel(
    a_ptr,  # (I, K), in tiles (BI, BC)
    b_ptr,  # (., J)
    rows_ptr,  # (K,) which row of b belongs to a column of a, or None for the same
    flags_ptr,  # which tiles of a are not all zero
    out_ptr,  # (I, J) fp32, contiguous
    sizes,  # I, J, K
    a_strides,
    b_strides,
    flag_strides,
    ADD: tl.constexpr,
    ROUND: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    """``out (+)= a @ b[rows]``, skipping the tiles of ``a`` that are all zero."""
    I, J, K = sizes  # noqa: E741
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    acc = tl.zeros((BI, BJ), tl.float32)
    for step in range(0, tl.cdiv(K, BC)):
        if tl.load(flags_ptr + tl.program_id(0) * flag_strides[0] + step * flag_strides[1]) != 0:
            k = step * BC + tl.arange(0, BC)
            rows = k.to(tl.int64)
            if rows_ptr is not None:
                rows = tl.load(rows_ptr + k, mask=k < K, other=0).to(tl.int64)
            a = tl.load(
                a_ptr + i.to(tl.int64)[:, None] * a_strides[0] + k.to(tl.int64)[None, :] * a_strides[1],
                mask=(i < I)[:, None] & (k < K)[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + rows[:, None] * b_strides[0] + j.to(tl.int64)[None, :] * b_strides[1],
                mask=(k < K)[:, None] & (j < J)[None, :],
                other=0.0,
            )
            acc = tl.dot(a, b.to(ROUND).to(a.dtype), acc, input_precision="ieee")
    out = out_ptr + i.to(tl.int64)[:, None] * J + j[None, :]
    within = (i < I)[:, None] & (j < J)[None, :]
    if ADD:
        acc += tl.load(out, mask=within, other=0.0)
    tl.store(out, acc, mask=within)
