"""Of a row's terms with sums of their own: their targets, and what their sums make of loss and gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import student_block, teacher_block
from .math import FRACTION, SCALARS, exponent
from .shares import after_sum, tabled_shares, target_of
from .terms import ADAPTIVE, COVERS, EVERYWHERE, GATE, INDEX, KL_AT_ONE, MIX, MIXED, OUTER


@triton.jit
def targets_of(scalars, k, token, TABLED: tl.constexpr):
    targets = ()
    for i in tl.static_range(len(TABLED)):
        targets = targets + (target_of(scalars + TABLED[i][INDEX] * SCALARS, k, token),)
    return targets


@triton.jit
def with_heads(student, teacher, V, scalars, norms, k, targets, TABLED: tl.constexpr, BLOCK: tl.constexpr):
    """``targets`` with the adaptive divergence's own ``beta`` and ``alpha``."""
    made = ()
    for i in tl.static_range(len(TABLED)):
        if TABLED[i][ADAPTIVE]:
            mass = tl.load(scalars + TABLED[i][INDEX] * SCALARS + FRACTION)
            beta, alpha = _head_share(student, teacher, V, norms, k, mass, BLOCK)
            made = made + ((targets[i][0], beta, alpha, k, targets[i][4]),)
        else:
            made = made + (targets[i],)
    return made


@triton.jit
def _head_share(student, teacher, V, norms, k, mass, BLOCK: tl.constexpr):
    """The shares of ``sum |p - q|`` in the head of ``p``, its most probable entries up to ``mass``, and in the rest.

    Finds the largest probability such that the entries at least as probable hold more than ``mass``, bit by bit.
    """
    s_max, s_inv, t_max, t_inv, _log_ratio = norms
    lanes = tl.arange(0, BLOCK)
    left_out = 0
    top = 0
    for i in range(0, 30):  # probabilities are at most 1.0 = 0x3f800000
        trial = left_out | (1 << (29 - i))
        held = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            z_t = teacher_block(teacher, start, start + lanes, V, BLOCK)
            p = tl.exp2(exponent(z_t, k, t_max)) * t_inv
            bits = p.to(tl.int32, bitcast=True)
            top = tl.maximum(top, tl.max(bits, axis=0))
            held += tl.where(bits >= trial, p, 0.0)
        left_out = tl.where(tl.sum(held, axis=0) > mass, trial, left_out)
    # All of the mass: nothing is left out, not even what has underflowed.
    left_out = tl.where(mass < 1.0, left_out, -1)
    head = tl.zeros((BLOCK,), tl.float32)
    tail = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        z_s, _slope, offsets = student_block(student, start, V, BLOCK)
        z_t = teacher_block(teacher, start, offsets, V, BLOCK)
        p = tl.exp2(exponent(z_t, k, t_max)) * t_inv
        bits = p.to(tl.int32, bitcast=True)
        error = tl.abs(p - tl.exp2(exponent(z_s, k, s_max)) * s_inv)
        inside = (bits > left_out) | (bits == top)
        head += tl.where(inside, error, 0.0)
        tail += tl.where(inside, 0.0, error)
    sum_head = tl.sum(head, axis=0)
    sum_tail = tl.sum(tail, axis=0)
    total = sum_head + sum_tail
    return tl.where(total == 0.0, 0.5, sum_head / total), tl.where(total == 0.0, 0.5, sum_tail / total)


@triton.jit
def after_sums(
    scalars,
    loss,
    free,
    hard,
    kl,
    inv_T,
    sums,
    targets,
    student_above,
    teacher_above,
    TABLED: tl.constexpr,
    EXCLUDES: tl.constexpr,
):
    """The loss; ``free`` with what only the sums tell; and ``own`` of
    :func:`fused_kd.rows.triton.gradient.write_gradient`."""
    of_q, of_p, of_y = free
    own = ()
    total = 0.0
    for i in tl.static_range(len(TABLED)):
        h_sum = sums[2 * i]
        of_term = scalars + TABLED[i][INDEX] * SCALARS
        if EXCLUDES and TABLED[i][EVERYWHERE]:
            beyond = student_above
            if TABLED[i][ADAPTIVE]:
                beyond = student_above & (tl.load(of_term + FRACTION) < 1.0)
                beyond = beyond | (teacher_above & (targets[i][1] > 0.0))
            elif TABLED[i][COVERS]:
                beyond = student_above | teacher_above
            h_sum += tl.where(beyond, float("inf"), 0.0)
        factor, floor = tabled_shares(of_term, hard, TABLED[i][MIXED], TABLED[i][GATE], TABLED[i][KL_AT_ONE])
        value, factor, of_kl = after_sum(h_sum, factor, kl, TABLED[i][OUTER])
        loss += value
        if TABLED[i][OUTER] == MIX:
            of_q += of_kl
            of_p += of_kl
        own = own + (factor * inv_T, floor * inv_T)
        total += factor * inv_T * sums[2 * i + 1] - floor * inv_T
    return loss, (of_q, of_p, of_y), own + (total,)
