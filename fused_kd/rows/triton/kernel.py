"""The Triton kernel of a row: all objectives, with or without gradient, with or without a teacher.

A program sweeps its row in blocks, so that a row may be longer than anything that fits on chip:

1. statistics: maxima, sums of exponentials and ``KL(p||q)`` of both rows at once; they give the difficulty;
2. ``sum h`` and ``sum g`` of a divergence other than ``KL(t||q)``, in rows that use one;
3. the gradient.

Special functions per element and sweep, and in brackets all instructions, counted in the machine code for sm_90 (fp32
logits, gradient in place):

=================================  =============  =======================  =======================  ======
row                                1. statistics  2. sums                  3. gradient              in all
=================================  =============  =======================  =======================  ======
cross-entropy alone                1 exp [8]      -                        1 exp [10]               2
``KL(t||q)``; easy rows of a gate  2 exp [18]     -                        2 exp [19]               4
reverse KL                         2 exp [18]     1 exp [12]               1 exp [21]               4
skewed KL; hard rows of a gate     2 exp [18]     2 exp, 1 rsqrt [46]      2 exp, 1 rsqrt [30]      8
generalised JSD                    2 exp [20]     2 exp, 1 rsqrt [64]      2 exp, 1 rsqrt [43]      8
=================================  =============  =======================  =======================  ======

A cross-entropy at another temperature adds 1 exp to sweeps 1 and 3, a softcap 1 exp and 1 division per sweep
and capped side. NVIDIA's special-function units do exponentials of 2 and reciprocal roots, 16 a clock and
multiprocessor; the logarithm is plain arithmetic. At 128 instructions a clock and multiprocessor, 46 of them for 8
bytes read are 22 bytes a clock, where the memory of an H100 gives 14. In the loops no thread waits for another: each
has its own maxima and sums until the row's end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    ALPHA,
    BETA,
    FRACTION,
    GAMMA,
    LN_2,
    LOG_ZERO,
    above_zero,
    cross_entropy,
    exponent,
    exponent_scale,
    first_entry,
    inverse_temperature,
    label_scalars,
    label_terms,
    weighed,
)
from .sweeps import (
    logits,
    student_block,
    sweep_both,
    sweep_student,
    sweep_sums,
    teacher_block,
    write_gradient,
    write_label_gradient,
    write_zeros,
)


@triton.jit
def row_kernel(
    student_ptr,  # (C, V) raw logits
    teacher_ptr,  # (C, V) raw logits or None
    dlogits_ptr,  # (C, V) or None; may be student_ptr
    labels_ptr,  # (C,)
    weights_ptr,  # (C,) or None
    scalars_ptr,  # those of fused_kd.objectives.Scalars
    loss_ptr,
    difficulty_ptr,
    hard_ptr,
    given_ptr,  # (C,) which rows are hard, or None
    entries_ptr,  # (C, K) ascending vocabulary ids where the teacher is sparse: teacher_ptr holds theirs; else None
    rest_ptr,  # (C,) the sparse teacher's logit of all others
    K,
    V,
    student_stride,
    teacher_stride,
    dlogits_stride,
    student_scale,  # None for 1
    student_cap,  # None without softcap
    teacher_scale,
    teacher_cap,
    h: tl.constexpr,
    g: tl.constexpr,
    free_g: tl.constexpr,
    FREE: tl.constexpr,
    MIXTURE: tl.constexpr,
    KL_AT_ONE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    EVERYWHERE: tl.constexpr,
    MIXED: tl.constexpr,
    HARD_LABEL: tl.constexpr,
    GATED: tl.constexpr,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,  # logits may be -inf
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads
    PACK: tl.constexpr,  # neighbouring columns that one of them loads
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    if label < 0:
        tl.store(loss_ptr + row, 0.0)
        tl.store(difficulty_ptr + row, 0.0)
        tl.store(hard_ptr + row, 0)
        if dlogits_ptr is not None:
            write_zeros(dlogits_ptr + row * dlogits_stride, V, BLOCK)
        return

    # Beyond the row: counts as an excluded token and is never dereferenced.
    label = tl.minimum(label, V).to(tl.int32)
    student = (student_ptr + row * student_stride, student_scale, student_cap)
    if dlogits_ptr is None:
        dlogits_row = None
    else:
        dlogits_row = dlogits_ptr + row * dlogits_stride

    if teacher_ptr is None:
        _cross_entropy(
            student, dlogits_row, V, row, label, weights_ptr, loss_ptr, difficulty_ptr, BLOCK, LANES, PACK
        )  # fmt: skip
        tl.store(hard_ptr + row, 0)
    else:
        teacher = (teacher_ptr + row * teacher_stride, teacher_scale, teacher_cap, entries_ptr, rest_ptr, row, K)
        _distill(
            student, teacher, dlogits_row, V, row, label, weights_ptr, scalars_ptr, loss_ptr, difficulty_ptr, hard_ptr,
            given_ptr, h, g, free_g, FREE, MIXTURE, KL_AT_ONE, ADAPTIVE, EVERYWHERE, MIXED, HARD_LABEL, GATED, COLD,
            EXCLUDES, BLOCK, LANES, PACK,
        )  # fmt: skip


@triton.jit
def _cross_entropy(
    student,
    dlogits_row,
    V,
    row,
    label,
    weights_ptr,
    loss_ptr,
    difficulty_ptr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    """Stores ``-log q_y``, and its gradient in ``dlogits_row`` unless that is None."""
    student_row, scale, cap = student
    # In place, the gradient overwrites the label's logit: read before the sums, which all threads wait for.
    label_z = logits(student_row, label, label < V, scale, cap)
    z_max, total = sweep_student(student, V, BLOCK, LANES, PACK)
    loss = cross_entropy(label_z, z_max, tl.log(total), 1.0)
    tl.store(loss_ptr + row, loss)
    tl.store(difficulty_ptr + row, loss)
    if dlogits_row is not None:
        write_label_gradient(student, dlogits_row, V, row, label, z_max, 1.0 / total, weights_ptr, BLOCK)


@triton.jit
def _distill(
    student,  # row pointer, scale, softcap
    teacher,  # the same, and what teacher_logits reads of a sparse one
    dlogits_row,
    V,
    row,
    label,
    weights_ptr,
    scalars_ptr,
    loss_ptr,
    difficulty_ptr,
    hard_ptr,
    given_ptr,
    h: tl.constexpr,
    g: tl.constexpr,
    free_g: tl.constexpr,
    FREE: tl.constexpr,
    MIXTURE: tl.constexpr,
    KL_AT_ONE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    EVERYWHERE: tl.constexpr,
    MIXED: tl.constexpr,
    HARD_LABEL: tl.constexpr,
    GATED: tl.constexpr,
    COLD: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads
    PACK: tl.constexpr,  # neighbouring columns that one of them loads
):
    """Stores loss, difficulty, hardness and, given a ``dlogits_row``, the gradient with a teacher."""
    of_label = label_scalars(scalars_ptr)
    lam, rest, _log_lam = of_label
    beta = tl.load(scalars_ptr + BETA)
    alpha = tl.load(scalars_ptr + ALPHA)
    gamma = tl.load(scalars_ptr + GAMMA)
    inv_T = inverse_temperature(scalars_ptr)
    k = exponent_scale(scalars_ptr)
    student_row, student_scale, student_cap = student

    # In place, the gradient overwrites the label's logit: read before the sums, which all threads wait for.
    label_z_s = logits(student_row, label, label < V, student_scale, student_cap)
    label_z_t = _teacher_label_logit(teacher, label, V)
    s_max, s_total, t_max, t_total, kl_total, cold_total, s_over, t_over = sweep_both(
        student, teacher, V, k, COLD, EXCLUDES, BLOCK, LANES, PACK
    )
    s_log = tl.log(s_total)
    t_log = tl.log(t_total)
    kl = (kl_total / t_total) * LN_2 - (t_log - s_log)
    kl = tl.where(kl < 0.0, 0.0, kl)  # unlike a maximum, keeps NaN
    student_above = above_zero(s_over, k, s_max, s_log, t_max)
    teacher_above = above_zero(t_over, k, t_max, t_log, s_max)
    if EXCLUDES:
        kl += tl.where(teacher_above, float("inf"), 0.0)

    label_log_q = (label_z_s - s_max) * inv_T - s_log
    label_log_p = (label_z_t - t_max) * inv_T - t_log
    ce = cross_entropy(label_z_s, s_max, s_log, inv_T)
    difficulty, label_log_t = label_terms(kl, label_log_p, label_log_q, ce, of_label)
    hard = False
    if GATED:
        if given_ptr is None:
            hard = difficulty > gamma
        else:
            hard = tl.load(given_ptr + row) != 0
    # Stored early: nothing but what sweeps 2 and 3 need should hold registers through them.
    tl.store(difficulty_ptr + row, difficulty)
    tl.store(hard_ptr + row, hard)

    cold_inv = 1.0
    if COLD:
        cold_inv = 1.0 / cold_total
        ce = cross_entropy(label_z_s, s_max, tl.log(cold_total), 1.0)
    share = lam
    ce_weight = 0.0
    if HARD_LABEL:
        ce_weight = rest
    if MIXED:
        share = 1.0
        loss = difficulty
    else:
        loss = weighed(lam, kl)
        if HARD_LABEL:
            loss += weighed(ce_weight, ce)
    tl.store(loss_ptr + row, loss)  # rows that take sweep 2 store another

    target = (of_label, beta, alpha, k, label_log_t - label_log_q)
    norms = (s_max, 1.0 / s_total, t_max, 1.0 / t_total, t_log - s_log)
    cold = (s_max, cold_inv)
    shares = (share * inv_T, ce_weight)
    # Which rows take sweep 2, and the sum of g: -1 without it.
    use = not FREE
    g_total = -1.0
    if KL_AT_ONE:
        use = alpha > 0.0
    if GATED:
        use = hard & use
    if use:
        if ADAPTIVE:
            fraction = tl.load(scalars_ptr + FRACTION)
            beta, alpha = _head_share(student, teacher, V, norms, k, fraction, BLOCK)
            target = (of_label, beta, alpha, k, label_log_t - label_log_q)
            student_above = student_above & (fraction < 1.0)
            student_above = student_above | (teacher_above & (beta > 0.0))
        h_sum, g_total = sweep_sums(student, teacher, V, label, target, norms, h, g, MIXTURE, MIXED, EXCLUDES, BLOCK)
        if EXCLUDES and EVERYWHERE:
            h_sum += tl.where(student_above, float("inf"), 0.0)
        loss = weighed(share, h_sum)
        if HARD_LABEL:
            loss += weighed(ce_weight, ce)
        tl.store(loss_ptr + row, loss)
    if dlogits_row is not None:
        write_gradient(
            use, g_total, student, teacher, dlogits_row, V, row, label, target, norms, cold, shares, weights_ptr,
            g, free_g, MIXTURE, MIXED, HARD_LABEL, COLD, EXCLUDES, BLOCK,
        )  # fmt: skip


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
def _teacher_label_logit(teacher, label, V):
    """That of the label, which is among a sparse teacher's entries."""
    row_ptr, scale, cap, entries_ptr, _rest_ptr, row, K = teacher
    if entries_ptr is None:
        z = logits(row_ptr, label, label < V, scale, cap)
    else:
        entries = entries_ptr + row * K
        z = tl.maximum(tl.load(row_ptr + tl.minimum(first_entry(entries, K, label), K - 1)), LOG_ZERO)
    return z
