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

from .blocks import fill, logits
from .gradient import write_gradient, write_label_gradient
from .math import (
    LN_2,
    LOG2_E,
    LOG_ZERO,
    above_zero,
    cross_entropy,
    exponent_scale,
    first_entry,
    inverse_temperature,
    weighed,
)
from .shares import any_takes_sums, difficulty_of, free_loss, is_hard, label_factors, linear_factors, with_floors
from .statistics import entropy, tell, tell_student
from .sweeps import sweep_both, sweep_student, sweep_sums
from .tabled import after_sums, targets_of, with_heads
from .terms import ALWAYS, BY_ENTROPY, COLD, NO_GATE, ROW_GATE, Z


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
            fill(dlogits_ptr + row * dlogits_stride, V, 0.0, BLOCK)
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
    z_max, total, product = sweep_student(student, V, LOG2_E, told is not None, BLOCK, LANES, PACK)
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
        tell_student(told, z_max + log_total, entropy(product, total), ce, (label_z - z_max) - log_total, COLUMNS)
    if dlogits_row is not None:
        write_label_gradient(student, dlogits_row, V, row, label, z_max, of_q / total, of_ce, weights_ptr, BLOCK)


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
    entropy_t = entropy(t_product, t_total)
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
        tell(
            told, student, teacher, V, k, inv_T, scalars, token, norms, (s_log, t_log, entropy(s_product, s_total)),
            ROW, COLUMNS, BLOCK,
        )  # fmt: skip
    if len(TABLED) == 0:
        _without_sums(
            student, teacher, dlogits_row, V, row, label, weights_ptr, scalars, k, inv_T, norms, free, hard, lse,
            cold_inv, TERMS, TABLED, ROW, BLOCK,
        )  # fmt: skip
    elif ROW[ALWAYS]:
        targets = with_heads(
            student, teacher, V, scalars, norms, k, targets_of(scalars, k, token, TABLED), TABLED, BLOCK
        )
        sums = sweep_sums(student, teacher, V, label, targets, norms, TABLED, EXCLUDES, BLOCK)
        loss, free, own = after_sums(
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
        targets = targets_of(scalars, k, token, TABLED)
        # Of what the branch computes, nothing but these numbers leaves it: more would hold registers.
        own = ()
        for _i in tl.static_range(2 * len(TABLED) + 1):
            own = own + (inv_T * 0.0,)
        if use:
            sums = sweep_sums(student, teacher, V, label, targets, norms, TABLED, EXCLUDES, BLOCK)
            with_sums, _free, own = after_sums(
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
def _teacher_label_logit(teacher, label, V):
    """That of the label, which is among a sparse teacher's entries."""
    row_ptr, scale, cap, entries_ptr, _rest_ptr, row, K = teacher
    if entries_ptr is None:
        z = logits(row_ptr, label, label < V, scale, cap)
    else:
        entries = entries_ptr + row * K
        z = tl.maximum(tl.load(row_ptr + tl.minimum(first_entry(entries, K, label), K - 1)), LOG_ZERO)
    return z
