// Sweep 2 of csrc/kd_row.cu: a divergence's h and g from the one table of formulas, their sums, and the weight of an
// adaptive one.
//
// FKD_DIVERGENCES(X) comes from fused_kd/rows/expressions.py: X(name, h, g) with C expressions over t, q, d, r, log_r, s,
// log_s, beta and alpha. FKD_DIVERGENCE is a position in that list; FKD_MIXTURE, FKD_MIXED, FKD_HARD_LABEL and FKD_COLD say
// what the divergence reads and what else the loss has.
#pragma once

#include "cuda_slots.h"
#include "cuda_sums.h"

#ifndef FKD_DIVERGENCES
#error "build through fused_kd.rows.cuda.build, which defines FKD_DIVERGENCES"
#endif

#define FKD_NAME(name, h, g) FKD_##name,
enum Divergence { FKD_DIVERGENCES(FKD_NAME) };


// Sweep 2 leaves q and g in the slots of fp32 logits; a softcap's slope and another temperature need the logit itself.
#define FKD_KEEPS (FKD_STUDENT == FP32 && FKD_TEACHER == FP32 && !FKD_SHAPED && !FKD_COLD)

// A row between its sweeps.
typedef struct {
    int64_t row;
    int label;        // -1: beyond the row
    float k;          // turns logits into exponents of 2
    float lam, rest;    // rest: 1 - lam
    float beta, alpha;  // the objective's, or of an adaptive divergence this row's
    float bound;        // the teacher's logits below it are those of excluded tokens
    float s_max, t_max;
    Pair s_norm, t_norm, cold_norm;  // exponentials to probabilities; the teacher's times lam in a mixed target
    float offset, label_d;           // log t - log q is the exponents' difference and offset; at the label label_d
    float divergence, labels;        // weights of the two gradients: share / T and 1 - lam or 0
} Norms;

FKD_INLINE void formulas(int divergence, float t, float q, float d, float r, float log_r, float s, float log_s,
                         float beta, float alpha, float *h, float *g) {
#define FKD_CASE(name, H, G) \
    case FKD_##name:         \
        *h = (H);            \
        *g = (G);            \
        break;
    switch (divergence) { FKD_DIVERGENCES(FKD_CASE) }
}

// q, h and g of one element; the compiler drops what the divergence does not read.
FKD_INLINE void evaluate(const Norms *norms, float z_s, float z_t, bool at_label, float *q, float *h, float *g) {
    const float a_s = (z_s - norms->s_max) * norms->k, a_t = (z_t - norms->t_max) * norms->k;
    *q = times(exp2_fast(a_s), norms->s_norm);
    float t = times(exp2_fast(a_t), norms->t_norm), d = (a_t - a_s) * LN_2 + norms->offset;
    if (FKD_MIXED && at_label) {
        t += norms->rest;
        d = norms->label_d;
    }
    if (FKD_EXCLUDES && z_t < norms->bound) d = LEFT_OUT;
    float r = t, log_r = d, s = *q, log_s = d;
    if (FKD_MIXTURE) {
        t += TINY;
        s += TINY;
        // beta * s + alpha * t from the side with the larger share, whose rounding would be that of all of them.
        const bool larger = norms->beta >= 0.5f;
        const float m = fmaf(larger ? norms->alpha : -norms->beta, t - s, larger ? s : t);
        r = quotient(t, m);
        log_r = log_positive(r);
        s = quotient(s, m);
        log_s = log_positive(s);
    }
    formulas(FKD_DIVERGENCE, t, *q, d, r, log_r, s, log_s, norms->beta, norms->alpha, h, g);
}

// The gradient in a logit: (share / T) * (g - q * sum g) and the hard label's. Only the first cancels.
FKD_INLINE float gradient_of(const Norms *norms, float z_s, bool at_label, float q, float g, float g_total) {
    const float x = norms->divergence * fmaf(-q, g_total, g);
    if (!FKD_HARD_LABEL) return x;
    if (FKD_COLD) q = times(exp2_fast((z_s - norms->s_max) * LOG2_E), norms->cold_norm);
    return x + norms->labels * (at_label ? q - 1.0f : q);
}

FKD_INLINE void divergence_sums(const Rows *rows, const Norms *norms, bool keep, float *sums) {
    sums[0] = sums[1] = 0.0f;
    FKD_ROLLED for (int slot = 0; slot < rows->slots; slot++) {
        float z_s[FKD_MOST], z_t[FKD_MOST], slope[FKD_MOST];
        slot_logits(rows, norms->row, slot, is_resident(rows, slot), false, z_s, slope, z_t);
        const int label = element_of(column_of(rows, slot), norms->label);
        FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
            float q, h, g;
            evaluate(norms, z_s[i], z_t[i], label == i, &q, &h, &g);
            sums[0] += h;
            sums[1] += g;
            z_s[i] = q, z_t[i] = g;
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
FKD_INLINE void head_share(const Rows *rows, Norms *norms, float fraction, int *phase) {
    int left_out = 0;
    float sums[FKD_RECORD];
    Pair totals[FKD_RECORD];
    for (int shift = 27; shift >= 0; shift -= 3) {
        FKD_UNROLL for (int j = 0; j < 7; j++) sums[j] = 0.0f;
        FKD_ROLLED for (int slot = 0; slot < rows->slots; slot++) {
            float z_s[FKD_MOST], z_t[FKD_MOST], slope[FKD_MOST];
            slot_logits(rows, norms->row, slot, is_resident(rows, slot), false, z_s, slope, z_t);
            FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
                const float p = times(exp2_fast((z_t[i] - norms->t_max) * norms->k), norms->t_norm);
                FKD_UNROLL for (int j = 0; j < 7; j++)
                    sums[j] += (int)as_bits(p) >= (left_out | (j + 1) << shift) ? p : 0.0f;
            }
        }
        reduce(sums, totals, 7, false, 0.0f, phase);
        int digit = 0;  // the masses fall
        FKD_UNROLL for (int j = 0; j < 7; j++) digit += whole(totals[j]) > fraction;
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
    norms->beta = all == 0.0f ? 0.5f : quotient(head, all);
    norms->alpha = all == 0.0f ? 0.5f : quotient(tail, all);
}
