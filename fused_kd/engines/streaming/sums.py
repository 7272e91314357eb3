"""Triton kernels of the streaming engine's second sweep: each term's ``sum h`` and ``sum g`` of the rows that need
them."""

from __future__ import annotations

import triton
import triton.language as tl

from ...rows.triton.math import arguments, inverse_temperature
from ...rows.triton.shares import after_sum
from ...rows.triton.terms import MIX, MIXED, MIXTURE, OUTER, POWERS, G, H
from .kernels import FACTORS, KL_OF_TOKEN, TERM_NORMS, TOTAL, row_norms, row_scalars, row_targets
from .tiles import placed, tile


@triton.jit(do_not_specialize=["n", "scalars_stride"])
def sums_kernel(
    student,
    teacher,
    chosen_ptr,  # (n,) positions of the rows that need sums, first
    chosen_count_ptr,  # how many they are, int32
    tokens_ptr,
    labels_ptr,
    norms_ptr,
    scalars_ptr,
    scalars_stride,
    partials_ptr,  # (splits, 2 terms, n) by place in chosen_ptr
    n,
    V,
    span,
    PER_TOKEN: tl.constexpr,
    TABLED: tl.constexpr,
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
    norms = row_norms(norms_ptr, positions, n)
    targets = row_targets(norms_ptr, row_scalars(scalars_ptr, scalars_stride, tokens, PER_TOKEN), positions, n, TABLED)

    sums = ()
    for _i in tl.static_range(2 * len(TABLED)):
        sums = sums + (tl.zeros((BM,), tl.float32),)
    for start in range(split * span, tl.minimum((split + 1) * span, V), BN):
        columns = start + tl.arange(0, BN)
        z_s, _slope = tile(student, tokens, start, V, ROUND_S, UPCAST, BM, BN, BK)
        z_t, _slope_t = tile(teacher, tokens, start, V, ROUND_T, UPCAST, BM, BN, BK)
        at_label = columns[None, :] == labels[:, None]
        sums = _add_sums(z_s, z_t, at_label, targets, norms, sums, TABLED, EXCLUDES)

    out = partials_ptr + (split.to(tl.int64) * (2 * len(TABLED))) * n + places
    for i in tl.static_range(2 * len(TABLED)):
        tl.store(out + i * n, sums[i], mask=places < count)


@triton.jit
def _add_sums(z_s, z_t, at_label, targets, norms, sums, TABLED: tl.constexpr, EXCLUDES: tl.constexpr):
    added = ()
    for i in tl.static_range(len(TABLED)):
        t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v = arguments(
            z_s, z_t, at_label, targets[i], norms, TABLED[i][MIXED], TABLED[i][MIXTURE], TABLED[i][POWERS], EXCLUDES
        )
        of_h = TABLED[i][H](t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v)
        of_g = TABLED[i][G](t, q, d, r, log_r, s, log_s, beta, alpha, w, u, v)
        added = added + (sums[2 * i] + tl.sum(of_h, axis=1), sums[2 * i + 1] + tl.sum(of_g, axis=1))
    return added


@triton.jit(do_not_specialize=["n", "splits", "scalars_stride"])
def sums_combine_kernel(
    partials_ptr,
    chosen_ptr,
    chosen_count_ptr,
    tokens_ptr,
    norms_ptr,
    scalars_ptr,
    scalars_stride,
    loss_ptr,
    n,
    splits,
    TABLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chosen rows' loss, and the factors of their gradient, from the sums of the splits."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = places < tl.load(chosen_count_ptr)
    positions = tl.load(chosen_ptr + places, mask=valid, other=0)
    scalars = scalars_ptr + tl.load(tokens_ptr + positions, mask=valid, other=0) * scalars_stride
    inv_T = inverse_temperature(scalars)
    norms = norms_ptr + positions
    kl = tl.load(norms + KL_OF_TOKEN * n, mask=valid, other=0.0)
    loss = tl.load(loss_ptr + positions, mask=valid, other=0.0)
    total = tl.load(norms + TOTAL * n, mask=valid, other=0.0)
    for i in tl.static_range(len(TABLED)):
        h_sum = tl.zeros((BLOCK,), tl.float32)
        g_sum = tl.zeros((BLOCK,), tl.float32)
        for split in range(0, splits):
            part = partials_ptr + (tl.cast(split, tl.int64) * (2 * len(TABLED)) + 2 * i) * n + places
            h_sum += tl.load(part, mask=valid, other=0.0)
            g_sum += tl.load(part + n, mask=valid, other=0.0)
        own = norms + (TERM_NORMS + 3 * i + 1) * n
        value, factor, of_kl = after_sum(h_sum, tl.load(own, mask=valid, other=0.0), kl, TABLED[i][OUTER])
        loss += value
        total += factor * inv_T * g_sum
        tl.store(own, factor * inv_T, mask=valid)
        if TABLED[i][OUTER] == MIX:
            # More of q and p: the first and second linear factors, the third's scale with them.
            scale = tl.load(norms + FACTORS * n, mask=valid, other=0.0)
            more = scale + of_kl * inv_T
            some = tl.where(more > 0.0, more, 1.0)
            of_p = tl.load(norms + (FACTORS + 1) * n, mask=valid, other=0.0) * scale + of_kl * inv_T
            of_y = tl.load(norms + (FACTORS + 2) * n, mask=valid, other=0.0) * scale
            tl.store(norms + FACTORS * n, more, mask=valid)
            tl.store(norms + (FACTORS + 1) * n, tl.div_rn(of_p, some), mask=valid)
            tl.store(norms + (FACTORS + 2) * n, tl.div_rn(of_y, some), mask=valid)
    tl.store(loss_ptr + positions, loss, mask=valid)
    tl.store(norms + TOTAL * n, total, mask=valid)
