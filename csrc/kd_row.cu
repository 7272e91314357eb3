// The row on NVIDIA GPUs, which reads each logit from memory once. Inputs and outputs: fused_kd/rows/contract.py.
//
// A cluster of blocks takes a row at a time and holds it in its shared memory, student and teacher:
//   1. statistics, while the row arrives: every thread over its own slots, then one reduction over the cluster; they
//      give the difficulty, so the gate is decided on chip;
//   2. rows whose divergence is not KL(t||q): h and g of every element, a second reduction; q and g replace fp32 logits,
//      as they are what the gradient needs;
//   3. the gradient; behind it, each slot is filled with the next row's, so that memory is read while it is written.
// Where shared memory has room, the next row's first slots are asked for in sweep 1 already, beside the row.
//
// Bytes an element: a student's and a teacher's logit read, a dlogit written, whatever the row. Slots that do not fit
// (cuda_slots.h) are read in each of the 2 or 3 sweeps.
//
// Special functions an element, as counted in the machine code (tests/test_cuda_compile.py), ex2 and rcp, of 16 a clock
// and multiprocessor; the logarithm is a polynomial:
//
//                  sweep 1   sweep 2         sweep 3
//   cross-entropy  1         -               1
//   easy rows      2         -               2
//   hard rows      2         2 + 1 (ratios)  0; those 3 again where q and g are not kept (cuda_divergence.h)
//
// Sweep 1 takes 0.5 more (0.25 of 16-bit logits and of cross-entropy) to rescale a slot's sums. Cross-entropy at
// another temperature adds 1 to sweep 1 and 1 to sweep 2 or 3, a softcap 2 a sweep and side. By its data sheet, an H200
// does 7 to 9 in the time that it takes for the bytes of an element with fp32 logits, 4 to 5 with bf16 ones.
//
// Macros beside those of cuda_slots.h and cuda_divergence.h: FKD_MAIN, the term whose KL(yt||q) is the difficulty,
// FKD_COLD, FKD_EXCLUDES (logits may be -inf).
//
// NaN logits become NaN losses: comparisons are written so that NaN falls through.

#include "cuda_shares.h"

FKD_INLINE bool first_of_cluster() { return cluster_rank() == 0 && thread_index() == 0; }

FKD_INLINE void store_loss(float *x, int64_t row, float loss) { global_write4(x + row, as_bits(loss)); }

// ---- sweep 1

// Asks for the first slots of row `next` (unless it is C) beside this one's. `over` (2,): the largest logits of the
// student and the teacher where the other excludes a token.
FKD_INLINE void statistics(const Call *call, const Norms *norms, int64_t next, float *sums, float *over) {
    const Rows *rows = &call->rows;
    const Begin begin = begin_of(rows, next);
    const int ahead = next < call->C ? rows->ahead : 0;
    no_statistics(sums);
    over[0] = over[1] = OUTSIDE;
    int slot = 0;
    FKD_ROLLED for (int group = 0; group < FKD_GROUPS + !FKD_WHOLE; group++) {  // the last: what does not fit
        if (group < FKD_GROUPS) group_wait(rows, group);
        const int end = group < FKD_GROUPS ? group_end(rows, group) : rows->slots;
        FKD_ROLLED for (; slot < end; slot++) {
            float z_s[FKD_MOST], z_t[FKD_MOST], slope[FKD_MOST];
            slot_logits(rows, norms->row, slot, is_resident(rows, slot), true, z_s, slope, z_t);
            const int label = element_of(column_of(rows, slot), norms->label);
            if (label >= 0 && label < FKD_WIDTH) {
                FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
                    if (label != i) continue;
                    sums[LABEL_S] = z_s[i];
                    if (FKD_TEACHER >= 0) sums[LABEL_T] = z_t[i];
                }
            }
            if (FKD_EXCLUDES) {
                FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
                    if (z_t[i] < EXCLUDED) over[0] = fmaxf(over[0], z_s[i]);
                    if (z_s[i] < EXCLUDED) over[1] = fmaxf(over[1], z_t[i]);
                }
            }
            add_slot(sums, z_s, z_t, norms->k);
            if (slot < ahead) request_slot(rows, &begin, slot, next_turn(rows));
        }
        if (group < FKD_GROUPS) copies_commit();
    }
}

// ---- sweep 3

typedef enum { LINEAR, EVALUATED, KEPT } Form;  // how an element of the gradient is made

typedef struct {
    Pair q, t, cold;  // of a linear one: factors of the exponentials
    float at_label;
    float g_total, weight;  // of the others
} Gradient;

FKD_INLINE void gradient_slot(const Call *call, const Norms *norms, const Gradient *gradient, Form form, int slot,
                              bool resident) {
    const Rows *rows = &call->rows;
    const int label = element_of(column_of(rows, slot), norms->label);
    float z_s[FKD_MOST], z_t[FKD_MOST], slope[FKD_MOST];
    if (form == KEPT && resident) {
        read_slot(FP32, student_slot(rows, slot, rows->turn), z_s);
        read_slot(FP32, teacher_slot(rows, slot, rows->turn), z_t);
        float x[FKD_MOST];
        const float total = gradient->g_total, weight = gradient->weight;
        FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++)
            x[i] = gradient_of(norms, 0.0f, false, z_s[i], z_t[i], total) * weight;
        if ((FKD_ALL & HARD_LABEL) && label >= 0 && label < FKD_WIDTH)  // seldom, hence apart
            FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++)
                if (label == i) x[i] = gradient_of(norms, 0.0f, true, z_s[i], z_t[i], total) * weight;
        write_row(rows, norms->row, column_of(rows, slot), x);
        return;
    }
    const bool with_teacher = FKD_TEACHER >= 0;
    slot_logits(rows, norms->row, slot, resident, false, z_s, slope, z_t);
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
        float x;
        if (form == LINEAR) {
            const float e_s = exp2_fast((z_s[i] - norms->s_max) * norms->k);
            x = e_s * gradient->q.low;
            if (with_teacher) {
                const float e_t = exp2_fast((z_t[i] - norms->t_max) * norms->k);
                x = fmaf(-e_t, gradient->t.high, fmaf(-e_t, gradient->t.low, x));
            }
            x = fmaf(e_s, gradient->q.high, x);
            if (FKD_COLD) x += times(exp2_fast((z_s[i] - norms->s_max) * LOG2_E), gradient->cold);
            if (label == i) x -= gradient->at_label;
        } else {
            float q, h, g, linear;
            evaluate_terms(norms, z_s[i], z_t[i], label == i, &q, &h, &g, &linear);
            if (any_free()) g += linear;
            x = gradient_of(norms, z_s[i], label == i, q, g, gradient->g_total) * gradient->weight;
        }
        z_s[i] = FKD_SHAPED ? x * slope[i] : x;
    }
    write_row(rows, norms->row, column_of(rows, slot), z_s);
}

// Asks for the rest of row `next` (unless it is C) behind the gradient.
FKD_INLINE void write_gradient(const Call *call, const Norms *norms, const Gradient *gradient, Form form,
                               int64_t next) {
    const Rows *rows = &call->rows;
    // First what is read again: the sweep before may have left it in the cache.
    if (!FKD_WHOLE)
        FKD_ROLLED for (int slot = rows->slots - 1; slot >= rows->resident; slot--)
            gradient_slot(call, norms, gradient, form, slot, false);
    const Begin begin = begin_of(rows, next);
    const int first = next < call->C ? rows->ahead : rows->resident;
    int slot = 0;
    FKD_ROLLED for (int group = 0; group < FKD_GROUPS; group++) {
        FKD_ROLLED for (; slot < group_end(rows, group); slot++) {
            gradient_slot(call, norms, gradient, form, slot, true);
            if (slot >= first) request_slot(rows, &begin, slot, next_turn(rows));
        }
        copies_commit();
    }
}

// ---- a row

// dz = (of_q * q - of_p * p - of_y * y) / T + of_c * c - labels * y, with c the softmax at temperature 1.
FKD_INLINE Gradient linear_gradient(const Norms *norms, const Pair *totals, float weight) {
    Gradient gradient;
    const float warm = norms->inv_T * norms->of_q + (FKD_COLD ? 0.0f : norms->of_c);
    gradient.q = inverse(totals[0], weight * warm);
    gradient.t = pair(0.0f, 0.0f);
    if (FKD_TEACHER >= 0) gradient.t = inverse(totals[T_SUM - FKD_MAXIMA], weight * (norms->inv_T * norms->of_p));
    gradient.cold = norms->cold_norm;
    if (FKD_COLD) gradient.cold = inverse(totals[COLD - FKD_MAXIMA], weight * norms->of_c);
    gradient.at_label = weight * (norms->labels + norms->inv_T * norms->of_y);
    gradient.g_total = 0.0f;
    gradient.weight = weight;
    return gradient;
}

FKD_INLINE void finish_row(const Call *call, const Norms *norms, const Gradient *gradient, Form form, int64_t next) {
    if (call->rows.dlogits)
        write_gradient(call, norms, gradient, form, next);
    else if (next < call->C)
        request_slots(&call->rows, next, next_turn(&call->rows), call->rows.ahead, call->rows.resident);
}

FKD_INLINE void cross_entropy_row(const Call *call, Norms *norms, const float *sums, const Pair *totals, int64_t next) {
    const float ce = cross_entropy(sums[LABEL_S], sums[S_MAX], log_of(totals[0]), 1.0f);
    const float loss = label_loss(call, norms, ce, sums[S_MAX] + log_of(totals[0]));
    if (first_of_cluster()) {
        store_loss(call->loss, norms->row, loss);
        store_loss(call->difficulty, norms->row, ce);
        global_write1(call->is_hard + norms->row, 0);
    }
    const Gradient gradient = linear_gradient(norms, totals, weight_of(call, norms->row));
    finish_row(call, norms, &gradient, LINEAR, next);
}

FKD_INLINE void distilled_row(const Call *call, Norms *norms, float *sums, const float *over, Pair *totals,
                              int64_t next, int *phase) {
    const int64_t row = norms->row;
    const float inv_T = norms->inv_T;
    const Pair s_total = totals[S_SUM - FKD_MAXIMA], t_total = totals[T_SUM - FKD_MAXIMA];
    const Pair s_norm = inverse(s_total, 1.0f), t_norm = inverse(t_total, 1.0f);
    // One logarithm of the ratio: two would each be rounded at their own size.
    const float log_ratio = log_positive(times(t_total.high, s_norm) + t_total.low * s_norm.high);
    const float s_log = log_of(s_total), t_log = log_of(t_total);
    Token token;
    token.kl = at_least_zero(times(whole(totals[KL - FKD_MAXIMA]), t_norm) * LN_2 - log_ratio);
    bool student_above = false, teacher_above = false;
    if (FKD_EXCLUDES) {
        student_above = above_zero(over[0], sums[S_MAX], s_log, inv_T, sums[T_MAX]);
        teacher_above = above_zero(over[1], sums[T_MAX], t_log, inv_T, sums[S_MAX]);
        if (teacher_above) token.kl += INFINITE;
        norms->bound = sums[T_MAX] >= EXCLUDED ? EXCLUDED : -INFINITE;
        norms->s_bound = sums[S_MAX] >= EXCLUDED ? EXCLUDED : -INFINITE;
    }
    token.log_q = (sums[LABEL_S] - sums[S_MAX]) * inv_T - s_log;
    token.log_p = (sums[LABEL_T] - sums[T_MAX]) * inv_T - t_log;
    token.warm_ce = cross_entropy(sums[LABEL_S], sums[S_MAX], s_log, inv_T);
    norms->s_norm = s_norm, norms->t_norm = t_norm;
    if (FKD_ALL & POWERS) norms->s_log = s_log * LOG2_E, norms->t_log = t_log * LOG2_E;
    float ce = token.warm_ce, log_sum_exp = sums[S_MAX] + s_log;
    if (FKD_COLD) {
        const Pair cold_total = totals[COLD - FKD_MAXIMA];
        ce = cross_entropy(sums[LABEL_S], sums[S_MAX], log_of(cold_total), 1.0f);
        log_sum_exp = sums[S_MAX] + log_of(cold_total);
        norms->cold_norm = inverse(cold_total, 1.0f);
    }
    const float difficulty = difficulty_of(call, row, FKD_MAIN, &token);
    float loss = label_loss(call, norms, ce, log_sum_exp);
    bool hard = false, use = false;
    FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++)
        if (gate_of(j) != GATE_NONE)
            hard = is_hard_row(call, norms, j, &token, difficulty, t_log, t_norm, phase);
    norms->of_q = norms->of_p = norms->of_y = 0.0f;
    Term *terms = norms->terms;
    FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) {
        if (!has(j, HAS_TEACHER)) continue;
        const float lam = scalar(call, row, j, SCALAR_lam), rest = scalar(call, row, j, SCALAR_rest);
        float share = scalar(call, row, j, SCALAR_weight);
        if (!has(j, MIXED)) share *= lam;
        if (gate_of(j) == GATE_ENTROPY && !hard) share = 0.0f;
        float kept = 0.0f, free = share;
        if (is_tabled(j)) {
            bool takes = gate_of(j) == GATE_NONE || gate_of(j) == GATE_ENTROPY || hard;
            if (has(j, KL_AT_ONE)) takes = takes && scalar(call, row, j, SCALAR_alpha) > 0.0f;
            kept = takes ? share : 0.0f;
            free = takes ? 0.0f : share;
            if (has(j, KL_AT_ONE) && takes) {
                kept = share * scalar(call, row, j, SCALAR_kept);
                free = share * scalar(call, row, j, SCALAR_floor);
            }
            use = use || takes;
            terms[j].rest = rest;
            terms[j].beta = scalar(call, row, j, SCALAR_beta), terms[j].alpha = scalar(call, row, j, SCALAR_alpha);
            terms[j].t_norm = has(j, MIXED) ? inverse(t_total, lam) : t_norm;
            terms[j].offset = (has(j, MIXED) ? scalar(call, row, j, SCALAR_log_lam) : 0.0f) - log_ratio;
            terms[j].label_d = log_or_tiny(label_target(&token, lam, rest)) - token.log_q;
            terms[j].share = terms[j].factor = kept;
            terms[j].floor = free;
        }
        float value = token.kl;
        if (has(j, MIXED)) value = j == FKD_MAIN ? difficulty : difficulty_of(call, row, j, &token);
        loss += weighed(free, value);
        if (!is_tabled(j)) add_free(norms, free, has(j, MIXED) ? lam : 1.0f, has(j, MIXED) ? rest : 0.0f);
    }
    // In rows that take sums, evaluate_terms has the targets at hand.
    FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) {
        if (use || !is_tabled(j)) continue;
        const float lam = has(j, MIXED) ? scalar(call, row, j, SCALAR_lam) : 1.0f;
        add_free(norms, terms[j].floor, lam, has(j, MIXED) ? terms[j].rest : 0.0f);
    }
    Gradient gradient = linear_gradient(norms, totals, weight_of(call, row));
    Form form = LINEAR;
    if (any_tabled() && use) {
        FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) {
            if (!is_tabled(j)) continue;
            if (has(j, ADAPTIVE)) {
                const float fraction = scalar(call, row, j, SCALAR_fraction);
                head_share(&call->rows, norms, j, fraction, phase);
                if ((student_above && fraction < 1.0f) || (teacher_above && terms[j].beta > 0.0f))
                    loss += weighed(terms[j].share, INFINITE);
            } else if ((has(j, EVERYWHERE) && student_above) || (has(j, COVERS) && teacher_above)) {
                loss += weighed(terms[j].share, INFINITE);
            }
        }
        if (any_outer()) {
            outer_sums(&call->rows, norms, sums);
            reduce(sums, totals, FKD_TERMS, false, 0.0f, phase);
            FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) {
                if (outer_of(j) == OUTER_NONE) continue;
                const float sum = whole(totals[j]), share = terms[j].share;
                if (outer_of(j) == OUTER_MINUS_LOG) {
                    const float least = fmaxf(sum, LEAST_SUM);
                    loss += weighed(share, sum > 0.0f ? -log_positive(least) : (sum == 0.0f ? INFINITE : sum));
                    terms[j].factor = -share * reciprocal(least);
                } else {
                    const float w = exp_fast(-OVERLAP_DECAY * sum);
                    loss += share * (1.0f - w) * (1.0f - sum) + weighed(share * w, token.kl);
                    terms[j].factor = -share * (1.0f - w);
                    add_free(norms, share * w, 1.0f, 0.0f);
                }
            }
        }
        form = FKD_KEEPS && call->rows.dlogits ? KEPT : EVALUATED;
        divergence_sums(&call->rows, norms, form == KEPT, sums);
        reduce(sums, totals, 2, false, 0.0f, phase);
        loss += whole(totals[0]);
        gradient.g_total = whole(totals[1]);
    }
    if (first_of_cluster()) {
        store_loss(call->loss, row, loss);
        store_loss(call->difficulty, row, difficulty);
        global_write1(call->is_hard + row, hard);
    }
    if (!any_tabled() || form == LINEAR)
        finish_row(call, norms, &gradient, LINEAR, next);
    else
        finish_row(call, norms, &gradient, FKD_KEEPS ? KEPT : EVALUATED, next);
}

// The cluster's next row at or after `row` that is not left out, or at least C; those in between become 0.
FKD_INLINE int64_t next_row(const Call *call, int64_t row) {
    const Rows *rows = &call->rows;
    for (; row < call->C && label_of(call, row) < 0; row += cluster_count()) {
        if (first_of_cluster()) {
            store_loss(call->loss, row, 0.0f);
            store_loss(call->difficulty, row, 0.0f);
            global_write1(call->is_hard + row, 0);
        }
        if (!rows->dlogits) continue;
        const float zeros[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        FKD_ROLLED for (int slot = 0; slot < rows->slots; slot++) write_row(rows, row, column_of(rows, slot), zeros);
    }
    return row;
}

FKD_KERNEL void fkd_row(const void *student, int64_t student_stride, float student_scale, float student_cap,
                        const void *teacher, int64_t teacher_stride, float teacher_scale, float teacher_cap,
                        void *dlogits, int64_t dlogits_stride,  // strides in bytes
                        const int64_t *entries, const float *rest, int32_t K, int64_t C, int32_t V, int32_t resident,
                        int32_t ahead, const int64_t *labels, const float *weights, const float *scalars,
                        int64_t scalars_stride, const uint8_t *given, float *loss, float *difficulty, uint8_t *is_hard) {
    Call call;
    Rows *rows = &call.rows;
    rows->student.data = (const char *)student, rows->student.stride = student_stride;
    rows->student.scale = student_scale, rows->student.cap = student_cap;
    rows->teacher.data = (const char *)teacher, rows->teacher.stride = teacher_stride;
    rows->teacher.scale = teacher_scale, rows->teacher.cap = teacher_cap;
    rows->dlogits = (char *)dlogits, rows->dlogits_stride = dlogits_stride;
    rows->entries = entries, rows->rest = rest;
    rows->K = K, rows->V = V, rows->resident = resident, rows->ahead = ahead;
    place(rows, FKD_RECORDS_BYTES);
    call.C = C, call.labels = labels, call.weights = weights;
    call.scalars = scalars, call.scalars_stride = scalars_stride;
    call.loss = loss, call.difficulty = difficulty, call.is_hard = is_hard, call.given = given;

    int phase = 0;
    int64_t row = next_row(&call, cluster_index());
    if (row < C)
        FKD_ROLLED for (int part = 0; part < 2; part++)
            request_slots(rows, row, rows->turn, part ? ahead : 0, part ? rows->resident : ahead);
    cluster_barrier();  // the other blocks' shared memory exists from here on
    while (row < C) {
        const int64_t next = next_row(&call, row + cluster_count()), label = label_of(&call, row);
        const float T = FKD_TEACHER < 0 ? 1.0f : scalar(&call, row, 0, SCALAR_temperature);
        Norms norms;
        norms.row = row;
        norms.label = label < V ? (int)label : -1;
        norms.k = exponent_scale(T);
        norms.inv_T = FKD_TEACHER < 0 ? 1.0f : fminf(reciprocal(T), COLDEST);
        float sums[FKD_RECORD], over[FKD_RECORD];
        Pair totals[FKD_RECORD];
        statistics(&call, &norms, next, sums, over);
        if (FKD_EXCLUDES) {
            FKD_UNROLL for (int i = 2; i < FKD_RECORD; i++) over[i] = i < FKD_MAXIMA ? OUTSIDE : 0.0f;
            reduce(over, totals, FKD_RECORD, true, norms.k, &phase);
        }
        reduce(sums, totals, FKD_RECORD, true, norms.k, &phase);
        norms.s_max = sums[S_MAX], norms.t_max = sums[T_MAX];
        norms.s_norm = norms.t_norm = norms.cold_norm = pair(0.0f, 0.0f);
        norms.bound = norms.s_bound = norms.s_log = norms.t_log = norms.of_q = norms.of_p = norms.of_y = 0.0f;
        if (FKD_TEACHER < 0)
            cross_entropy_row(&call, &norms, sums, totals, next);
        else
            distilled_row(&call, &norms, sums, over, totals, next, &phase);
        row = next;
        rows->turn = next_turn(rows);
    }
    cluster_barrier();  // a block's shared memory must outlive what others write to it
}
