"""The Triton kernel of a row: all objectives, with or without gradient, with or without a teacher.

A program sweeps its row in blocks, so that a row may be longer than anything that fits on chip:

1. statistics: maxima, sums of exponentials and ``KL(p||q)`` of both rows at once; they give the difficulty;
2. ``sum h`` and ``sum g`` of a divergence other than ``KL(t||q)``, in rows that use one;
3. the gradient.

Special functions per element and sweep, and in brackets all instructions, counted in the machine code for sm_90 (fp32
logits, gradient in place):

==================================  =============  =======================  =======================  ======
row                                 1. statistics  2. sums                  3. gradient              in all
==================================  =============  =======================  =======================  ======
cross-entropy alone                 1 exp [8]      -                        1 exp [10]               2
``KL(t||q)``; easy rows of a gate   2 exp [18]     -                        2 exp [18]               4
reverse KL                          2 exp [18]     1 exp [12]               1 exp [20]               4
KL and reverse KL                   2 exp [18]     1 exp [12]               2 exp [24]               5
skewed KL; hard rows of a gate      2 exp [21]     2 exp, 1 rsqrt [47]      2 exp, 1 rsqrt [32]      8
generalised JSD                     2 exp [21]     2 exp, 1 rsqrt [65]      2 exp, 1 rsqrt [45]      8
the same and cross-entropy          2 exp [21]     2 exp, 1 rsqrt [65]      2 exp, 1 rsqrt [49]      8
generalised JSD and skewed KL       2 exp [20]     2 exp, 2 rsqrt [100]     2 exp, 2 rsqrt [61]      10
==================================  =============  =======================  =======================  ======

A cross-entropy at another temperature adds 1 exp to sweeps 1 and 3, a softcap 1 exp and 1 division per sweep
and capped side. NVIDIA's special-function units do exponentials of 2 and reciprocal roots, 16 a clock and
multiprocessor; the logarithm is plain arithmetic. At 128 instructions a clock and multiprocessor, 47 of them for 8
bytes read are 22 bytes a clock, where the memory of an H100 gives 14: up to 73 instructions hide behind it, and the
last row, with 1.4 times the instructions of JSD, would take 1.1 times as long. In the loops no thread waits for
another: each has its own maxima and sums until the row's end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...terms import STATISTICS, WITHOUT_SWEEP
from .math import (
    FRACTION,
    LN_2,
    LOG_ZERO,
    SCALARS,
    above_zero,
    cross_entropy,
    exponent,
    exponent_scale,
    first_entry,
    inverse_temperature,
    label_scalars,
    weighed,
)
from .shares import (
    after_sum,
    any_takes_sums,
    difficulty_of,
    free_loss,
    is_hard,
    label_factors,
    linear_factors,
    tabled_shares,
    target_of,
    with_floors,
)
from .sweeps import (
    logits,
    student_block,
    sweep_agreement,
    sweep_both,
    sweep_student,
    sweep_sums,
    teacher_block,
    write_gradient,
    write_label_gradient,
    write_zeros,
)
from .terms import (
    ADAPTIVE,
    ALWAYS,
    BY_ENTROPY,
    COLD,
    COVERS,
    EVERYWHERE,
    GATE,
    INDEX,
    KL_AT_ONE,
    MAIN,
    MIX,
    MIXED,
    NO_GATE,
    OUTER,
    ROW_GATE,
    Z,
)

# The columns of fused_kd.terms.STATISTICS.
LOG_SUM_EXP_S, LOG_SUM_EXP_T, ENTROPY_S, ENTROPY_T, KL = (tl.constexpr(i) for i in range(5))
CROSS_ENTROPY, LOG_Q_Y, LOG_P_Y, TARGET_ENTROPY, TOP_1, OVERLAP = (tl.constexpr(i) for i in range(5, len(STATISTICS)))
WITHOUT = tl.constexpr(WITHOUT_SWEEP)


@triton.jit(do_not_specialize=["scalars_stride", "statistics_stride"])
def row_kernel(
    student_ptr,  # (C, V) raw logits
    teacher_ptr,  # (C, V), (C, K) log-probabilities of a sparse one, or None
    dlogits_ptr,  # (C, V) or None; may be student_ptr
    labels_ptr,  # (C,) negative: left out
    weights_ptr,  # (C,) or None
    scalars_ptr,  # of each term, see fused_kd.rows.triton.math
    loss_ptr,  # (C,) as are the next two
    difficulty_ptr,
    hard_ptr,
    given_ptr,  # (C,) which rows are hard, or None
    statistics_ptr,  # (C, COLUMNS) or None
    entries_ptr,  # (C, K) vocabulary ids of a sparse teacher, ascending, or None
    rest_ptr,  # (C,) its log-probability of each other token, or None
    K,
    V,
    student_stride,
    teacher_stride,
    dlogits_stride,
    scalars_stride,  # 0 where all rows share them
    statistics_stride,
    student_scale,  # None for 1
    student_cap,  # None without softcap
    teacher_scale,
    teacher_cap,
    TERMS: tl.constexpr,
    TABLED: tl.constexpr,
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,  # of statistics
    EXCLUDES: tl.constexpr,  # logits may be -inf
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads
    PACK: tl.constexpr,  # neighbouring columns that one of them loads
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    if statistics_ptr is None:
        told = None
    else:
        told = statistics_ptr + row * statistics_stride
    if label < 0:
        tl.store(loss_ptr + row, 0.0)
        tl.store(difficulty_ptr + row, 0.0)
        tl.store(hard_ptr + row, 0)
        if told is not None:
            for i in tl.static_range(COLUMNS):
                tl.store(told + i, 0.0)
        if dlogits_ptr is not None:
            write_zeros(dlogits_ptr + row * dlogits_stride, V, BLOCK)
        return

    # Beyond the row: counts as an excluded token and is never dereferenced.
    label = tl.minimum(label, V).to(tl.int32)
    scalars = scalars_ptr + row * scalars_stride
    student = (student_ptr + row * student_stride, student_scale, student_cap)
    if dlogits_ptr is None:
        dlogits_row = None
    else:
        dlogits_row = dlogits_ptr + row * dlogits_stride

    if teacher_ptr is None:
        _without_teacher(
            student, dlogits_row, V, row, label, weights_ptr, scalars, loss_ptr, difficulty_ptr, told, TERMS, ROW,
            COLUMNS, BLOCK, LANES, PACK,
        )  # fmt: skip
        tl.store(hard_ptr + row, 0)
    else:
        teacher = (teacher_ptr + row * teacher_stride, teacher_scale, teacher_cap, entries_ptr, rest_ptr, row, K)
        _distill(
            student, teacher, dlogits_row, V, row, label, weights_ptr, scalars, loss_ptr, difficulty_ptr, hard_ptr,
            given_ptr, told, TERMS, TABLED, ROW, COLUMNS, EXCLUDES, BLOCK, LANES, PACK,
        )  # fmt: skip


@triton.jit
def _without_teacher(
    student,
    dlogits_row,
    V,
    row,
    label,
    weights_ptr,
    scalars,
    loss_ptr,
    difficulty_ptr,
    told,
    TERMS: tl.constexpr,
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    PACK: tl.constexpr,
):
    """Stores ``ce * -log q_y + z * log_sum_exp ** 2``, and its gradient in ``dlogits_row`` unless that is None."""
    student_row, scale, cap = student
    # In place, the gradient overwrites the label's logit: read before the sums, which all threads wait for.
    label_z = logits(student_row, label, label < V, scale, cap)
    z_max, total, product = sweep_student(student, V, told is not None, BLOCK, LANES, PACK)
    log_total = tl.log(total)
    ce = cross_entropy(label_z, z_max, log_total, 1.0)
    of_ce, of_z = label_factors(scalars, TERMS)
    loss = weighed(of_ce, ce)
    of_q = of_ce
    if ROW[Z]:
        lse = z_max + log_total
        loss += of_z * lse * lse
        of_q += 2.0 * of_z * lse
    tl.store(loss_ptr + row, loss)
    tl.store(difficulty_ptr + row, ce)
    if told is not None:
        for i in tl.static_range(COLUMNS):
            tl.store(told + i, float("nan"))
        tl.store(told + LOG_SUM_EXP_S, z_max + log_total)
        tl.store(told + ENTROPY_S, _entropy(product, total))
        tl.store(told + CROSS_ENTROPY, ce)
        tl.store(told + LOG_Q_Y, (label_z - z_max) - log_total)
    if dlogits_row is not None:
        write_label_gradient(student, dlogits_row, V, row, label, z_max, of_q / total, of_ce, weights_ptr, BLOCK)


@triton.jit
def _entropy(product, total):
    """Of exponentials' sum, and that of their products with their exponents."""
    return tl.log(total) - (product / total) * LN_2


@triton.jit
def _distill(
    student,  # row pointer, scale, softcap
    teacher,  # the same, and what teacher_logits reads of a sparse one
    dlogits_row,
    V,
    row,
    label,
    weights_ptr,
    scalars,
    loss_ptr,
    difficulty_ptr,
    hard_ptr,
    given_ptr,
    told,
    TERMS: tl.constexpr,
    TABLED: tl.constexpr,
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXCLUDES: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads
    PACK: tl.constexpr,  # neighbouring columns that one of them loads
):
    """Stores loss, difficulty, hardness and, given a ``dlogits_row``, the gradient with a teacher."""
    inv_T = inverse_temperature(scalars)
    k = exponent_scale(scalars)
    student_row, student_scale, student_cap = student

    # In place, the gradient overwrites the label's logit: read before the sums, which all threads wait for.
    label_z_s = logits(student_row, label, label < V, student_scale, student_cap)
    label_z_t = _teacher_label_logit(teacher, label, V)
    s_max, s_total, t_max, t_total, kl_total, cold_total, s_over, t_over, s_product, t_product = sweep_both(
        student, teacher, V, k, ROW[COLD], EXCLUDES, told is not None,
        (told is not None) or (ROW[ROW_GATE] == BY_ENTROPY), BLOCK, LANES, PACK,
    )  # fmt: skip
    s_log = tl.log(s_total)
    t_log = tl.log(t_total)
    kl = (kl_total / t_total) * LN_2 - (t_log - s_log)
    kl = tl.where(kl < 0.0, 0.0, kl)  # unlike a maximum, keeps NaN
    student_above = above_zero(s_over, k, s_max, s_log, t_max)
    teacher_above = above_zero(t_over, k, t_max, t_log, s_max)
    if EXCLUDES:
        kl += tl.where(teacher_above, float("inf"), 0.0)

    log_q_y = (label_z_s - s_max) * inv_T - s_log
    log_p_y = (label_z_t - t_max) * inv_T - t_log
    warm_ce = cross_entropy(label_z_s, s_max, s_log, inv_T)
    ce = warm_ce
    lse = s_max * inv_T + s_log
    cold_inv = 1.0
    if ROW[COLD]:
        cold_inv = 1.0 / cold_total
        ce = cross_entropy(label_z_s, s_max, tl.log(cold_total), 1.0)
        lse = s_max + tl.log(cold_total)
    entropy_t = _entropy(t_product, t_total)
    token = (kl, log_p_y, log_q_y, warm_ce, ce, lse, entropy_t)
    difficulty = difficulty_of(scalars, token, ROW)
    if ROW[ROW_GATE] == NO_GATE:
        hard = difficulty != difficulty
        tl.store(hard_ptr + row, 0)
    else:
        if given_ptr is None:
            hard = is_hard(scalars, token, difficulty, ROW)
        else:
            hard = tl.load(given_ptr + row) != 0
        tl.store(hard_ptr + row, hard)
    # Stored early: nothing but what sweeps 2 and 3 need should hold registers through them.
    tl.store(difficulty_ptr + row, difficulty)
    loss, free = free_loss(scalars, token, difficulty, hard, TERMS, ROW)
    tl.store(loss_ptr + row, loss)  # rows that take sweep 2 store another

    norms = (s_max, 1.0 / s_total, t_max, 1.0 / t_total, t_log - s_log)
    if told is not None:
        _tell(
            told, student, teacher, V, k, inv_T, scalars, token, norms, (s_log, t_log, _entropy(s_product, s_total)),
            ROW, COLUMNS, BLOCK,
        )  # fmt: skip
    if len(TABLED) == 0:
        _without_sums(
            student, teacher, dlogits_row, V, row, label, weights_ptr, scalars, k, inv_T, norms, free, hard, lse,
            cold_inv, TERMS, TABLED, ROW, BLOCK,
        )  # fmt: skip
    elif ROW[ALWAYS]:
        targets = _with_heads(
            student, teacher, V, scalars, norms, k, _targets(scalars, k, token, TABLED), TABLED, BLOCK
        )
        sums = sweep_sums(student, teacher, V, label, targets, norms, TABLED, EXCLUDES, BLOCK)
        loss, free, own = _after_sums(
            scalars, loss, free, hard, kl, inv_T, sums, targets, student_above, teacher_above, TABLED, EXCLUDES
        )
        tl.store(loss_ptr + row, loss)
        if dlogits_row is not None:
            factors = linear_factors(scalars, free, inv_T, lse, cold_inv, TERMS, ROW)
            write_gradient(
                student, teacher, dlogits_row, V, row, label, k, targets, norms, s_max, factors, own, weights_ptr,
                True, False, TABLED, ROW, EXCLUDES, BLOCK,
            )  # fmt: skip
    else:
        use = any_takes_sums(scalars, hard, TABLED)
        targets = _targets(scalars, k, token, TABLED)
        # Of what the branch computes, nothing but these numbers leaves it: more would hold registers.
        own = ()
        for _i in tl.static_range(2 * len(TABLED) + 1):
            own = own + (inv_T * 0.0,)
        if use:
            sums = sweep_sums(student, teacher, V, label, targets, norms, TABLED, EXCLUDES, BLOCK)
            with_sums, _free, own = _after_sums(
                scalars, loss, free, hard, kl, inv_T, sums, targets, student_above, teacher_above, TABLED, EXCLUDES
            )
            tl.store(loss_ptr + row, with_sums)
        if dlogits_row is not None:
            if use:
                factors = linear_factors(scalars, free, inv_T, lse, cold_inv, TERMS, ROW)
                write_gradient(
                    student, teacher, dlogits_row, V, row, label, k, targets, norms, s_max, factors, own, weights_ptr,
                    True, False, TABLED, ROW, EXCLUDES, BLOCK,
                )  # fmt: skip
            else:
                _without_sums(
                    student, teacher, dlogits_row, V, row, label, weights_ptr, scalars, k, inv_T, norms, free, hard,
                    lse, cold_inv, TERMS, TABLED, ROW, BLOCK,
                )  # fmt: skip


@triton.jit
def _without_sums(
    student,
    teacher,
    dlogits_row,
    V,
    row,
    label,
    weights_ptr,
    scalars,
    k,
    inv_T,
    norms,
    free,
    hard,
    lse,
    cold_inv,
    TERMS: tl.constexpr,
    TABLED: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the gradient of a row whose divergences are all KL, unless ``dlogits_row`` is None."""
    if dlogits_row is not None:
        free = with_floors(scalars, hard, free, TABLED)
        factors = linear_factors(scalars, free, inv_T, lse, cold_inv, TERMS, ROW)
        write_gradient(
            student, teacher, dlogits_row, V, row, label, k, (), norms, norms[0], factors, (), weights_ptr,
            False, True, TABLED, ROW, False, BLOCK,
        )  # fmt: skip


@triton.jit
def _targets(scalars, k, token, TABLED: tl.constexpr):
    targets = ()
    for i in tl.static_range(len(TABLED)):
        targets = targets + (target_of(scalars + TABLED[i][INDEX] * SCALARS, k, token),)
    return targets


@triton.jit
def _with_heads(student, teacher, V, scalars, norms, k, targets, TABLED: tl.constexpr, BLOCK: tl.constexpr):
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
def _after_sums(
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
    :func:`fused_kd.rows.triton.sweeps.write_gradient`."""
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


@triton.jit
def _tell(
    told,
    student,
    teacher,
    V,
    k,
    inv_T,
    scalars,
    token,
    norms,
    of_sides,  # logarithms of both sums of exponentials, and H(q)
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the first columns of fused_kd.terms.STATISTICS. ``top_1`` says whether some token has the largest logit of
    both sides, also where several share it."""
    kl, log_p_y, log_q_y, _warm_ce, ce, _lse, entropy_t = token
    s_max, _s_inv, t_max, _t_inv, _log_ratio = norms
    s_log, t_log, entropy_s = of_sides
    tl.store(told + LOG_SUM_EXP_S, s_max * inv_T + s_log)
    tl.store(told + LOG_SUM_EXP_T, t_max * inv_T + t_log)
    tl.store(told + ENTROPY_S, entropy_s)
    tl.store(told + ENTROPY_T, entropy_t)
    tl.store(told + KL, kl)
    tl.store(told + CROSS_ENTROPY, ce)
    tl.store(told + LOG_Q_Y, log_q_y)
    tl.store(told + LOG_P_Y, log_p_y)
    # H(yt) from H(p)
    lam, rest, log_lam = label_scalars(scalars + ROW[MAIN] * SCALARS)
    p_y = tl.exp(log_p_y)
    t_y = lam * p_y + rest
    of_p = tl.where(p_y > 0.0, p_y * log_p_y, 0.0)
    of_t = tl.where(t_y > 0.0, t_y * tl.log(t_y), 0.0)
    entropy_y = lam * (entropy_t + of_p) - lam * log_lam * (1.0 - p_y) - of_t
    tl.store(told + TARGET_ENTROPY, tl.where(entropy_y < 0.0, 0.0, entropy_y))
    if COLUMNS > WITHOUT:
        top_1, overlap = sweep_agreement(student, teacher, V, k, norms, BLOCK)
        tl.store(told + TOP_1, tl.where(top_1, 1.0, 0.0))
        tl.store(told + OVERLAP, overlap)


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
