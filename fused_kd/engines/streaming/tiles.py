"""Tiles (BM, BN) of final logits: by ``tl.dot`` over blocks of BK hidden units, or loaded where logits were given.

A side is a tuple ``(source, token stride, unit stride, weight, row stride, unit stride, bias, H, scale, softcap)``:
``weight`` None says that the source holds logits, ``softcap`` None that there is no cap. ``ROUND_*`` is the dtype to
which a side's operands are rounded; UPCAST multiplies them in fp32 all the same (the interpreter has no bf16 product).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...rows.triton.math import OUTSIDE, final_logits


@triton.jit
def placed(GROUP: tl.constexpr):
    """The program's place in a grid (blocks of tokens, parts of the vocabulary).

    Programs start in the order of their numbers, blocks first. Here GROUP blocks go through all parts before the next
    do, so that those that run together share both hidden states and weights in the L2 cache.
    """
    blocks = tl.num_programs(0)
    parts = tl.num_programs(1)
    started = tl.program_id(1) * blocks + tl.program_id(0)
    first = started // (GROUP * parts) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    place = started - first * parts
    block = first + place % size
    part = place // size
    return block, part


@triton.jit
def tile(
    side,
    tokens,
    first_column,
    V,
    ROUND: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Final logits (BM, BN) from a column on, ``OUTSIDE`` from V on, and d final / d raw."""
    source, token_stride, unit_stride, weight, row_stride, weight_stride, bias, H, scale, cap = side
    lanes = tl.arange(0, BN)
    columns = first_column + lanes
    within = (columns < V)[None, :]
    source_rows = source + tokens.to(tl.int64)[:, None] * token_stride
    if weight is None:
        source_rows += tl.cast(first_column, tl.int64) * unit_stride
        z = tl.load(source_rows + (lanes * unit_stride)[None, :], mask=within, other=0.0).to(tl.float32)
    else:
        units = tl.arange(0, BK)
        # Columns beyond the vocabulary read its last one: the loop's loads need one mask less.
        held = tl.minimum(columns, V - 1)
        a_ptrs = source_rows + units[None, :] * unit_stride
        b_ptrs = weight + held.to(tl.int64)[None, :] * row_stride + units[:, None] * weight_stride
        z = tl.zeros((BM, BN), tl.float32)
        for start in range(0, H, BK):
            left = H - start
            a = tl.load(a_ptrs, mask=(units < left)[None, :], other=0.0).to(ROUND)
            b = tl.load(b_ptrs, mask=(units < left)[:, None], other=0.0).to(ROUND)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b, z, input_precision="ieee")
            a_ptrs += BK * unit_stride
            b_ptrs += BK * weight_stride
        if bias is not None:
            z += tl.load(bias + held).to(ROUND).to(tl.float32)[None, :]
    z, slope = final_logits(z, scale, cap)
    return tl.where(within, z, OUTSIDE), slope
