// Sweep 2 of csrc/kd_row.cu: h and g of each term from the one table of formulas, their sums, and the weights of an
// adaptive one.
//
// FKD_DIVERGENCES(X) comes from fused_kd/rows/expressions.py: X(name, h, g) with C expressions over t, q, d, r, log_r, s,
// log_s, beta, alpha, w, u and v. FKD_TERMS is the number of terms, FKD_TERM_0, FKD_TERM_1, ... what each is made of, in
// bits (fused_kd/rows/cuda/row.py); FKD_ALL has the bits of any. GATE_ and OUTER_ numbers come with the divergences.
#pragma once

#include "cuda_slots.h"
#include "cuda_sums.h"

#ifndef FKD_DIVERGENCES
#error "build through fused_kd.rows.cuda.build, which defines FKD_DIVERGENCES"
#endif

#define FKD_NAME(name, h, g) FKD_##name,
enum Divergence { FKD_DIVERGENCES(FKD_NAME) };

#ifndef FKD_MOST_TERMS
#define FKD_MOST_TERMS FKD_TERMS
#endif

// Of a term: its divergence in the lowest 8 bits, numbers of gate and outer function, flags.
#define FKD_GATE_AT 8
#define FKD_OUTER_AT 12
enum Trait {
    HAS_TEACHER = 1 << 14,
    FREE = 1 << 15,
    MIXTURE = 1 << 16,
    POWERS = 1 << 17,
    KL_AT_ONE = 1 << 18,
    ADAPTIVE = 1 << 19,
    EVERYWHERE = 1 << 20,
    COVERS = 1 << 21,
    MIXED = 1 << 22,
    HARD_LABEL = 1 << 23,
    Z_LOSS = 1 << 24,
};

FKD_INLINE int term_bits(int j) {
    switch (j) {
        case 0: return FKD_TERM_0;
        case 1: return FKD_TERM_1;
        case 2: return FKD_TERM_2;
        case 3: return FKD_TERM_3;
        case 4: return FKD_TERM_4;
        case 5: return FKD_TERM_5;
        case 6: return FKD_TERM_6;
        default: return FKD_TERM_7;
    }
}
#define FKD_ALL \
    (FKD_TERM_0 | FKD_TERM_1 | FKD_TERM_2 | FKD_TERM_3 | FKD_TERM_4 | FKD_TERM_5 | FKD_TERM_6 | FKD_TERM_7)

FKD_INLINE bool has(int j, int trait) { return (term_bits(j) & trait) != 0; }
FKD_INLINE int gate_of(int j) { return term_bits(j) >> FKD_GATE_AT & 15; }
FKD_INLINE int outer_of(int j) { return term_bits(j) >> FKD_OUTER_AT & 3; }
FKD_INLINE bool is_tabled(int j) { return has(j, HAS_TEACHER) && !has(j, FREE); }

FKD_INLINE bool any_tabled() {
    bool found = false;
    FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) found = found || is_tabled(j);
    return found;
}

// Whether rows that take sums have a linear part of p and q beside them.
FKD_INLINE bool any_free() {
    bool found = false;
    FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++)
        found = found || (has(j, HAS_TEACHER) && has(j, FREE)) || outer_of(j) == OUTER_MIX;
    return found;
}

FKD_INLINE bool any_outer() {
    bool found = false;
    FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) found = found || outer_of(j) != OUTER_NONE;
    return found;
}

// Sweep 2 leaves q and g in the slots of fp32 logits; a softcap's slope and another temperature need the logit itself.
#define FKD_KEEPS (FKD_STUDENT == FP32 && FKD_TEACHER == FP32 && !FKD_SHAPED && !FKD_COLD)

// A term with sums, in a row that takes them: its share is 0 where this row's KL takes its place.
typedef struct {
    float rest, beta, alpha;  // rest: 1 - lam; beta, alpha: the objective's, or of an adaptive divergence this row's
    Pair t_norm;              // the teacher's exponentials to probabilities, times lam in a mixed target
    float offset, label_d;    // log t - log q is the exponents' difference and offset; at the label label_d
    float share, floor;       // of sum h in the loss, and of -t in the gradient
    float factor;             // of g
} Term;

// A row between its sweeps.
typedef struct {
    int64_t row;
    int label;    // -1: beyond the row
    float k;      // turns logits into exponents of 2
    float inv_T;
    float bound, s_bound;  // the teacher's and the student's logits below it are those of excluded tokens
    float s_max, t_max;
    float s_log, t_log;  // logarithms of the sums to base 2, where powers are read
    Pair s_norm, t_norm, cold_norm;  // exponentials to probabilities
    float of_q, of_p, of_y;          // the linear part's factors, before the temperature
    float labels, of_c;              // of the label's indicator and the softmax at temperature 1
    Term terms[FKD_MOST_TERMS];
} Norms;

FKD_INLINE void formulas(int divergence, float t, float q, float d, float r, float log_r, float s, float log_s,
                         float beta, float alpha, float w, float u, float v, float *h, float *g) {
#define FKD_CASE(name, H, G) \
    case FKD_##name:         \
        *h = (H);            \
        *g = (G);            \
        break;
    switch (divergence) { FKD_DIVERGENCES(FKD_CASE) }
}

// q, and t, h and g of a term, of one element; the compiler drops what the divergence does not read.
FKD_INLINE void evaluate(const Norms *norms, int j, float z_s, float z_t, bool at_label, float *q, float *target,
                         float *h, float *g) {
    const Term *term = &norms->terms[j];
    const float x_s = z_s - norms->s_max, x_t = z_t - norms->t_max;
    const float a_s = x_s * norms->k, a_t = x_t * norms->k;
    *q = times(exp2_fast(a_s), norms->s_norm);
    // Not of a_t - a_s: fused with a product, that is the product's rounding where both are OUTSIDE, some 1e23.
    float t = times(exp2_fast(a_t), term->t_norm), d = (x_t - x_s) * (norms->k * LN_2) + term->offset;
    if (has(j, MIXED) && at_label) {
        t += term->rest;
        d = term->label_d;
    }
    *target = t;
    if (FKD_EXCLUDES && z_t < norms->bound) d = LEFT_OUT;
    // What is excluded here and has underflowed there is TINY in both ratios, of which d would make something.
    if (FKD_EXCLUDES && has(j, COVERS) && z_s < norms->s_bound) d = LEFT_OUT;
    float r = t, log_r = d, s = *q, log_s = d, w = t, u = t, v = t;
    if (has(j, MIXTURE)) {
        t += TINY;
        s += TINY;
        // beta * s + alpha * t from the side with the larger share, whose rounding would be that of all of them.
        const bool larger = term->beta >= 0.5f;
        const float m = fmaf(larger ? term->alpha : -term->beta, t - s, larger ? s : t);
        r = quotient(t, m);
        log_r = log_positive(r);
        s = quotient(s, m);
        log_s = log_positive(s);
    }
    if (has(j, POWERS)) {
        const float log_t = a_t - norms->t_log, log_q = a_s - norms->s_log;
        w = exp2_fast(term->alpha * log_t + term->beta * log_q);
        u = exp2_fast((term->alpha + term->beta) * log_t);
        v = exp2_fast((term->alpha + term->beta) * log_q);
    }
    formulas(term_bits(j) & 255, t, *q, d, r, log_r, s, log_s, term->beta, term->alpha, w, u, v, h, g);
}

// Of one element in a row that takes sums: q, the terms' shares of h, their factors of g, and the linear part.
FKD_INLINE void evaluate_terms(const Norms *norms, float z_s, float z_t, bool at_label, float *q, float *h, float *g,
                               float *linear) {
    *h = *g = *linear = 0.0f;
    FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) {
        if (!is_tabled(j)) continue;
        float t, own_h, own_g;
        evaluate(norms, j, z_s, z_t, at_label, q, &t, &own_h, &own_g);
        const Term *term = &norms->terms[j];
        const bool used = FKD_TERMS == 1 || term->factor != 0.0f;  // unused, its ratios may be anything
        if (used && outer_of(j) == OUTER_NONE) *h = fmaf(term->share, own_h, *h);
        if (used) *g = fmaf(term->factor, own_g, *g);
        if (has(j, KL_AT_ONE)) *g = fmaf(-term->floor, t, *g);
    }
    if (!any_free()) return;
    const float p = times(exp2_fast((z_t - norms->t_max) * norms->k), norms->t_norm);
    *linear = fmaf(norms->of_q, *q, -norms->of_p * p);
    if (at_label) *linear -= norms->of_y;
}

// The gradient in a logit: (g - q * sum g) / T, with the linear part in g, and the hard label's.
FKD_INLINE float gradient_of(const Norms *norms, float z_s, bool at_label, float q, float g, float g_total) {
    const float x = norms->inv_T * fmaf(-q, g_total, g);
    if (!(FKD_ALL & (HARD_LABEL | Z_LOSS))) return x;
    if (FKD_COLD) q = times(exp2_fast((z_s - norms->s_max) * LOG2_E), norms->cold_norm);
    return x + (at_label ? norms->of_c * q - norms->labels : norms->of_c * q);
}

// sum h of each term whose value is a function of it, in their order.
FKD_INLINE void outer_sums(const Rows *rows, const Norms *norms, float *sums) {
    FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) sums[j] = 0.0f;
    FKD_ROLLED for (int slot = 0; slot < rows->slots; slot++) {
        float z_s[FKD_MOST], z_t[FKD_MOST], slope[FKD_MOST];
        slot_logits(rows, norms->row, slot, is_resident(rows, slot), false, z_s, slope, z_t);
        const int label = element_of(column_of(rows, slot), norms->label);
        FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
            FKD_UNROLL for (int j = 0; j < FKD_TERMS; j++) {
                if (outer_of(j) == OUTER_NONE) continue;
                float q, t, h, g;
                evaluate(norms, j, z_s[i], z_t[i], label == i, &q, &t, &h, &g);
                sums[j] += h;
            }
        }
    }
}

// The teacher's entropy, in nats: summands of one sign.
FKD_INLINE void entropy_sum(const Rows *rows, const Norms *norms, float log_total, float *sums) {
    sums[0] = 0.0f;
    FKD_ROLLED for (int slot = 0; slot < rows->slots; slot++) {
        float z_s[FKD_MOST], z_t[FKD_MOST], slope[FKD_MOST];
        slot_logits(rows, norms->row, slot, is_resident(rows, slot), false, z_s, slope, z_t);
        FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
            const float a_t = (z_t[i] - norms->t_max) * norms->k, e_t = exp2_fast(a_t);
            if (e_t > 0.0f) sums[0] += e_t * fmaf(-a_t, LN_2, log_total);
        }
    }
}

FKD_INLINE void divergence_sums(const Rows *rows, const Norms *norms, bool keep, float *sums) {
    sums[0] = sums[1] = 0.0f;
    FKD_ROLLED for (int slot = 0; slot < rows->slots; slot++) {
        float z_s[FKD_MOST], z_t[FKD_MOST], slope[FKD_MOST];
        slot_logits(rows, norms->row, slot, is_resident(rows, slot), false, z_s, slope, z_t);
        const int label = element_of(column_of(rows, slot), norms->label);
        FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
            float q, h, g, linear;
            evaluate_terms(norms, z_s[i], z_t[i], label == i, &q, &h, &g, &linear);
            sums[0] += h;
            sums[1] += g;
            z_s[i] = q, z_t[i] = any_free() ? g + linear : g;
        }
        if (FKD_KEEPS && keep && is_resident(rows, slot)) {
            write_slot(student_slot(rows, slot, rows->turn), z_s);
            write_slot(teacher_slot(rows, slot, rows->turn), z_t);
        }
    }
}

// The shares of sum |p - q| in the head of p, its most probable entries up to `fraction` of the mass and the top, and in
// the rest.
// Finds the largest probability left out three bits at a time: floats of [0, 1] order as their bits do, in 30.
FKD_INLINE void head_share(const Rows *rows, Norms *norms, int j, float fraction, int *phase) {
    int left_out = 0;
    float sums[FKD_RECORD];
    Pair totals[FKD_RECORD];
    for (int shift = 27; shift >= 0; shift -= 3) {
        FKD_UNROLL for (int n = 0; n < 7; n++) sums[n] = 0.0f;
        FKD_ROLLED for (int slot = 0; slot < rows->slots; slot++) {
            float z_s[FKD_MOST], z_t[FKD_MOST], slope[FKD_MOST];
            slot_logits(rows, norms->row, slot, is_resident(rows, slot), false, z_s, slope, z_t);
            FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
                const float p = times(exp2_fast((z_t[i] - norms->t_max) * norms->k), norms->t_norm);
                FKD_UNROLL for (int n = 0; n < 7; n++)
                    sums[n] += (int)as_bits(p) >= (left_out | (n + 1) << shift) ? p : 0.0f;
            }
        }
        reduce(sums, totals, 7, false, 0.0f, phase);
        int digit = 0;  // the masses fall
        FKD_UNROLL for (int n = 0; n < 7; n++) digit += whole(totals[n]) > fraction;
        left_out |= digit << shift;
    }
    if (fraction >= 1.0f) left_out = -1;  // nothing is left out, not even what has underflowed
    // The top has the largest logit: exp2(0).
    const int top_bits = (int)as_bits(times(1.0f, norms->t_norm));
    sums[0] = sums[1] = 0.0f;
    FKD_ROLLED for (int slot = 0; slot < rows->slots; slot++) {
        float z_s[FKD_MOST], z_t[FKD_MOST], slope[FKD_MOST];
        slot_logits(rows, norms->row, slot, is_resident(rows, slot), false, z_s, slope, z_t);
        FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
            const float p = times(exp2_fast((z_t[i] - norms->t_max) * norms->k), norms->t_norm);
            const float error = fabsf(p - times(exp2_fast((z_s[i] - norms->s_max) * norms->k), norms->s_norm));
            const int bits = (int)as_bits(p);
            const bool inside = bits > left_out || bits == top_bits;
            sums[0] += inside ? error : 0.0f;
            sums[1] += inside ? 0.0f : error;
        }
    }
    reduce(sums, totals, 2, false, 0.0f, phase);
    const float head = whole(totals[0]), tail = whole(totals[1]), all = head + tail;
    norms->terms[j].beta = all == 0.0f ? 0.5f : quotient(head, all);
    norms->terms[j].alpha = all == 0.0f ? 0.5f : quotient(tail, all);
}
