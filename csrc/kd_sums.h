// Sweep 2 of csrc/kd_row.c: h and g of a row's terms from the one table of formulas, and their sums.
#pragma once

#include "kd_shares.h"

#define INLINE inline __attribute__((always_inline))

// t, q, d of fused_kd/divergences.py for a block; and its logits over the rows' maxima, which powers are made of.
typedef struct {
    float t[BLOCK], q[BLOCK], d[BLOCK], over_t[BLOCK], over_s[BLOCK];
} Arguments;

static INLINE void formulas(const int divergence, float t, float q, float d, float r, float log_r, float s, float log_s,
                            float beta, float alpha, float w, float u, float v, float *h, float *g) {
#define FKD_CASE(name, H, G) \
    case FKD_##name:         \
        *h = (H);            \
        *g = (G);            \
        break;
    switch (divergence) { FKD_DIVERGENCES(FKD_CASE) }
}

// h and g of a block. Inlined once a divergence, so that what it does not read costs nothing.
static INLINE void evaluate(const int divergence, int n, const Tabled *x, const Arguments *restrict a,
                            float *restrict h, float *restrict g) {
    const float beta = x->beta, alpha = x->alpha, both = alpha + beta;
    const Factor of_w = x->of_w, of_u = x->of_u, of_v = x->of_v;
#pragma omp simd
    for (int i = 0; i < n; i++) {
        const float t = a->t[i], q = a->q[i], raised = q + TINY, over_t = a->over_t[i], over_s = a->over_s[i];
        // beta * q + alpha * t from the side with the larger share, whose rounding would be that of all of them.
        const float m = beta < 0.5f ? t + beta * (raised - t) : raised + alpha * (t - raised);
        const float r = t / m, s = raised / m;
        const float w = times(exp_nonpositive(alpha * over_t + beta * over_s), of_w);
        const float u = times(exp_nonpositive(both * over_t), of_u), v = times(exp_nonpositive(both * over_s), of_v);
        formulas(divergence, t, q, a->d[i], r, log_positive(r), s, log_positive(s), beta, alpha, w, u, v, &h[i], &g[i]);
    }
}

static void evaluate_block(int n, const Tabled *x, const Arguments *a, float *h, float *g) {
#define FKD_EVALUATE(name, H, G)                \
    case FKD_##name:                            \
        evaluate(FKD_##name, n, x, a, h, g);    \
        break;
    switch (x->term->divergence) { FKD_DIVERGENCES(FKD_EVALUATE) }
}

// Target and student of a block.
static void probabilities(const Row *r, const Tabled *x, int64_t block, float *restrict t, float *restrict q) {
    const int n = block_length(r, block), label = x->term->mixed ? label_in(r, block) : -1;
    const float *e_s = r->student.exps + block * BLOCK, *e_t = r->teacher.exps + block * BLOCK;
    const Factor norm_s = split(normaliser(&r->student, block));
    const Factor norm_t = split(normaliser(&r->teacher, block) * (x->term->mixed ? x->own->lam : 1.0f));
    const float tiny = x->term->mixture ? TINY : 0.0f;
#pragma omp simd
    for (int i = 0; i < n; i++) {
        q[i] = times(e_s[i], norm_s);
        t[i] = times(e_t[i], norm_t) + tiny;
    }
    if (label >= 0) t[label] += x->own->rest;
}

// What terms read of a block's logits: d, also where the student excludes tokens and the target does not; powers.
typedef struct {
    bool d, covers, powers;
} Reads;

static Reads reads_of(const Tabled *x, int count) {
    Reads reads = {0};
    for (int j = 0; j < count; j++) {
        reads.d |= x[j].term->reads_d;
        reads.covers |= x[j].term->covers;
        reads.powers |= x[j].term->powers;
    }
    return reads;
}

static bool reads_mixed(const Tabled *x) { return x->term->mixed && x->term->reads_d; }

// log(p / q) of a block, or of the term's target if that is mixed, and its logits over the maxima, as far as they are
// read.
static void differences(const Row *r, const Tabled *x, int64_t block, Reads reads, Arguments *a) {
    if (!reads.d && !reads.powers) return;
    const Call *c = r->call;
    const int n = block_length(r, block), label = reads_mixed(x) ? label_in(r, block) : -1;
    const float T = r->temperature, max_s = r->student.max, max_t = r->teacher.max;
    const float *z_s = student_logits(c, r->row, block * BLOCK, n, a->over_s);
    const float *z_t = teacher_logits(c, r->row, block * BLOCK, n, a->over_t);
    bool out_s[BLOCK], out_t[BLOCK];
    const bool student_excludes = reads.covers && !c->student.finite && max_s >= cool(EXCLUDED, T);
    const bool teacher_excludes = reads.d && !c->teacher.finite && max_t >= cool(EXCLUDED, T);
    if (student_excludes)
        for (int i = 0; i < n; i++) out_s[i] = z_s[i] < EXCLUDED;
    if (teacher_excludes)
        for (int i = 0; i < n; i++) out_t[i] = z_t[i] < EXCLUDED;
    z_s = cooled(z_s, n, T, a->over_s);
    z_t = cooled(z_t, n, T, a->over_t);
    if (reads.d) {
        float offset = (float)(r->student.log_total - r->teacher.log_total);
        if (reads_mixed(x)) offset += x->own->log_lam;
#pragma omp simd
        for (int i = 0; i < n; i++) a->d[i] = ((z_t[i] - max_t) - (z_s[i] - max_s)) + offset;
        // Beside an infinite part there is no finite one.
        if (student_excludes)
            for (int i = 0; i < n; i++) a->d[i] = out_s[i] ? 0.0f : a->d[i];
        if (teacher_excludes)
            for (int i = 0; i < n; i++) a->d[i] = out_t[i] ? LEFT_OUT : a->d[i];
        if (label >= 0) a->d[label] = x->label_d;
    }
    if (!reads.powers) return;
#pragma omp simd
    for (int i = 0; i < n; i++) {
        a->over_s[i] = z_s[i] - max_s;
        a->over_t[i] = z_t[i] - max_t;
    }
}

// Teacher and student of a block, where equal logits must have equal probabilities in all blocks: over the row's
// maximum.
static void comparable(const Row *r, const Tabled *x, int64_t block, float *restrict t, float *restrict q) {
    const int n = block_length(r, block);
    float buffer[BLOCK];
    const float *z = teacher_logits(r->call, r->row, block * BLOCK, n, buffer);
    z = cooled(z, n, r->temperature, buffer);
    const Factor norm = split(1.0 / r->teacher.total);
    const float max = r->teacher.max;
    probabilities(r, x, block, t, q);
#pragma omp simd
    for (int i = 0; i < n; i++) t[i] = times(exp_nonpositive(z[i] - max), norm);
}

// The shares of sum |t - q| in the head of t, its most probable entries up to `fraction` of the mass and the top, and
// in the rest.
static void head_share(const Row *r, Tabled *x) {
    const float fraction = x->own->fraction;
    float t[BLOCK], q[BLOCK];
    // The largest t left out, found ten bits at a time from the mass of each digit's entries. Floats of [0, 2) order
    // as their bits do, which then fit 30.
    double mass[1024], inside = 0.0;
    uint32_t left_out = 0;
    bool all = fraction >= 1.0f;
    for (int shift = 20; shift >= 0 && !all; shift -= 10) {
        memset(mass, 0, sizeof mass);
        for (int64_t b = 0; b < r->blocks; b++) {
            comparable(r, x, b, t, q);
            for (int i = 0, n = block_length(r, b); i < n; i++) {
                uint32_t bits = as_bits(t[i]);
                if ((uint64_t)bits >> (shift + 10) == left_out) mass[(bits >> shift) & 1023] += t[i];
            }
        }
        int digit = 1023;
        for (; digit >= 0 && inside + mass[digit] <= fraction; digit--) inside += mass[digit];
        all = shift == 20 && digit < 0;
        left_out = left_out << 10 | (uint32_t)(digit > 0 ? digit : 0);  // below 0 by rounding alone
    }
    const float bound = all ? -1.0f : as_float(left_out);
    float top = 0.0f;
    double head = 0.0, tail = 0.0, head_top = 0.0;
    for (int64_t b = 0; b < r->blocks; b++) {
        comparable(r, x, b, t, q);
        for (int i = 0, n = block_length(r, b); i < n; i++) {
            const float error = fabsf(t[i] - q[i]);
            if (t[i] > bound)
                head += error;
            else
                tail += error;
            if (t[i] > top) top = t[i], head_top = 0.0;
            if (t[i] == top) head_top += error;
        }
    }
    if (top <= bound) head = head_top, tail -= head_top;
    const double total = head + tail;
    x->beta = total == 0.0 ? 0.5f : (float)(head / total);
    x->alpha = total == 0.0 ? 0.5f : (float)(tail / total);
}

// What a term needs beside its block's arguments.
static void prepare(const Row *r, Tabled *x) {
    if (x->term->adaptive) head_share(r, x);
    if (!x->term->powers) return;
    const double log_t = -r->teacher.log_total, log_s = -r->student.log_total, both = x->alpha + x->beta;
    x->of_w = split(exp(x->alpha * log_t + x->beta * log_s));
    x->of_u = split(exp(both * log_t));
    x->of_v = split(exp(both * log_s));
}

// Whether a term's sum, over what both sides have, lacks an infinite part.
static bool infinite(const Row *r, const Tabled *x) {
    const Term *term = x->term;
    if (term->adaptive)
        return (r->teacher_above && x->beta > 0.0f) || (r->student_above && x->own->fraction < 1.0f);
    return term->everywhere && (r->student_above || (term->covers && r->teacher_above));
}

static void settle_sum(const Row *r, Tabled *x, const Token *token, Shares *shares, double sum) {
    x->sum = infinite(r, x) ? sum + INFINITY : sum;  // NaN stays NaN
    after_sum(x, token, shares);
}

// sum h of one term. With `g_total` its g replaces the teacher's exponentials.
static double sum_alone(Row *r, const Tabled *x, double *g_total) {
    const Reads reads = reads_of(x, 1);
    Arguments a;
    float h[BLOCK], unused[BLOCK];
    double total = 0.0;
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        float *g = g_total ? r->teacher.exps + b * BLOCK : unused;
        probabilities(r, x, b, a.t, a.q);
        differences(r, x, b, reads, &a);
        evaluate_block(n, x, &a, h, g);
        total += sum(h, n);
        if (g_total) *g_total += sum(g, n);
    }
    return total;
}

// The sums of all terms, of which some may have theirs already, in one sweep. Returns that of factor * g.
static double sum_together(Row *r) {
    const Reads reads = reads_of(r->tabled, r->tabled_count);
    Arguments a;
    float h[BLOCK], g[BLOCK];
    double g_total = 0.0;
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        float *all = r->sums + b * BLOCK;
        memset(all, 0, (size_t)n * sizeof(float));
        for (int j = 0; j < r->tabled_count; j++) {
            Tabled *x = &r->tabled[j];
            const float factor = x->factor;
            probabilities(r, x, b, a.t, a.q);
            if (j == 0 || reads_mixed(x) || reads_mixed(x - 1)) differences(r, x, b, reads, &a);
            evaluate_block(n, x, &a, h, g);
            if (x->term->outer == OUTER_NONE) x->sum += sum(h, n);
#pragma omp simd
            for (int i = 0; i < n; i++) all[i] += factor * g[i];
        }
        g_total += sum(all, n);
    }
    return g_total;
}

// Of the gradient: `factor` times what `g` holds, less the student's probabilities `total` times. g NULL: nothing.
typedef struct {
    const float *g;
    double factor, total;
} Sums;

// Adds the terms' sums to the loss.
static Sums add_sums(Row *r, const Token *token, Shares *shares, bool wants_gradient) {
    for (int j = 0; j < r->tabled_count; j++) prepare(r, &r->tabled[j]);
    Tabled *first = r->tabled;
    if (wants_gradient && r->tabled_count == 1 && shares->p == 0.0 && first->term->outer != OUTER_MIX) {
        double g_total = 0.0;
        settle_sum(r, first, token, shares, sum_alone(r, first, &g_total));
        return (Sums){r->teacher.exps, first->factor, g_total};
    }
    for (int j = 0; j < r->tabled_count; j++) {
        Tabled *x = &r->tabled[j];
        x->factor = (float)x->share;
        if (!wants_gradient || x->term->outer != OUTER_NONE) settle_sum(r, x, token, shares, sum_alone(r, x, NULL));
    }
    if (!wants_gradient) return (Sums){0};
    const double g_total = sum_together(r);
    for (int j = 0; j < r->tabled_count; j++) {
        Tabled *x = &r->tabled[j];
        if (x->term->outer == OUTER_NONE) settle_sum(r, x, token, shares, x->sum);
    }
    return (Sums){r->sums, 1.0, g_total};
}
