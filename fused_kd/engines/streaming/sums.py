"""Triton kernels of the streaming engine's second sweep: ``sum h`` and ``sum g`` of the rows that need them."""

from __future__ import annotations

import triton
import triton.language as tl

from ...rows.triton.math import arguments
from .kernels import BASE, G_TOTAL, placed, row_terms, tile


@triton.jit(do_not_specialize=["n"])
def sums_kernel(
    student,
    teacher,
    chosen_ptr,  # (n,) positions of the rows that need sums, first
    chosen_count_ptr,  # how many they are, int32
    tokens_ptr,
    labels_ptr,
    norms_ptr,
    scalars_ptr,
    partials_ptr,  # (splits, 2, n) by place in chosen_ptr
    n,
    V,
    span,
    h: tl.constexpr,
    g: tl.constexpr,
    MIXTURE: tl.constexpr,
    MIXED: tl.constexpr,
    EXCLUDES: tl.constexpr,
    ROUND_S: tl.constexpr,
    ROUND_T: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``sum h`` and ``sum g`` of the chosen rows over a split of the vocabulary."""
    block, split = placed(GROUP)
    first = block * BM
    count = tl.load(chosen_count_ptr)
    if first >= count:
        return
    places = first + tl.arange(0, BM)
    positions = tl.load(chosen_ptr + tl.minimum(places, count - 1))
    tokens = tl.load(tokens_ptr + positions)
    labels = tl.load(labels_ptr + positions).to(tl.int32)
    target, norms = row_terms(norms_ptr, scalars_ptr, positions, n)

    h_sum = tl.zeros((BM,), tl.float32)
    g_sum = tl.zeros((BM,), tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, V), BN):
        columns = start + tl.arange(0, BN)
        z_s, _slope = tile(student, tokens, start, V, ROUND_S, UPCAST, BM, BN, BK)
        z_t, _slope_t = tile(teacher, tokens, start, V, ROUND_T, UPCAST, BM, BN, BK)
        at_label = columns[None, :] == labels[:, None]
        t, q, d, r, log_r, s, log_s, beta, alpha = arguments(
            z_s, z_t, at_label, target, norms, MIXED, MIXTURE, EXCLUDES
        )
        h_sum += tl.sum(h(t, q, d, r, log_r, s, log_s, beta, alpha), axis=1)
        g_sum += tl.sum(g(t, q, d, r, log_r, s, log_s, beta, alpha), axis=1)

    out = partials_ptr + (split.to(tl.int64) * 2) * n + places
    tl.store(out, h_sum, mask=places < count)
    tl.store(out + n, g_sum, mask=places < count)


@triton.jit(do_not_specialize=["n", "splits"])
def sums_combine_kernel(
    partials_ptr,
    chosen_ptr,
    chosen_count_ptr,
    norms_ptr,
    scalars_ptr,
    loss_ptr,
    n,
    splits,
    MIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chosen rows' loss and ``sum g`` from the sums of the splits."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = places < tl.load(chosen_count_ptr)
    positions = tl.load(chosen_ptr + places, mask=valid, other=0)
    share = 1.0
    if not MIXED:
        share = tl.load(scalars_ptr)
    h_sum = tl.zeros((BLOCK,), tl.float32)
    g_sum = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        part = partials_ptr + tl.cast(split, tl.int64) * 2 * n + places
        h_sum += tl.load(part, mask=valid, other=0.0)
        g_sum += tl.load(part + n, mask=valid, other=0.0)
    base = tl.load(norms_ptr + BASE * n + positions, mask=valid, other=0.0)
    tl.store(loss_ptr + positions, share * h_sum + base, mask=valid)
    tl.store(norms_ptr + G_TOTAL * n + positions, g_sum, mask=valid)
