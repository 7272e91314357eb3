// Sweep 3 of csrc/kd_row.c: the gradient in the logits, a linear combination of what scratch holds.
#pragma once

#include "kd_sums.h"

static void store(const Call *c, int64_t row, int64_t start, int n, const float *x) {
    const int64_t offset = row * c->dlogits_stride + start;
    if (c->dlogits_dtype == FP32) {
        memcpy((float *)c->dlogits + offset, x, (size_t)n * sizeof(float));
        return;
    }
    uint16_t *half = (uint16_t *)c->dlogits + offset;
    if (c->dlogits_dtype == BF16) {
#pragma omp simd
        for (int i = 0; i < n; i++) half[i] = to_bf16(x[i]);
    } else {
#pragma omp simd
        for (int i = 0; i < n; i++) half[i] = to_fp16(x[i]);
    }
}

// Where a block's gradient is made: in place, or in `buffer` if more is to be done with it.
static float *gradient_block(const Call *c, int64_t row, int64_t start, float *buffer) {
    if (c->dlogits_dtype != FP32 || c->student.softcap != 0.0f) return buffer;
    return (float *)c->dlogits + row * c->dlogits_stride + start;
}

// From the final logits to the raw ones, which may lie where the result goes, and to its dtype.
static void finish_gradient(const Call *c, int64_t row, int64_t start, int n, float *x, float *raw_buffer) {
    const float cap = c->student.softcap;
    if (cap != 0.0f) {
        const float *raw = raw_logits(&c->student, row, start, n, raw_buffer), inner = c->student.scale / cap;
#pragma omp simd
        for (int i = 0; i < n; i++) {
            float slope;
            tanh_and_slope(at_least_log_zero(raw[i]) * inner, &slope);
            x[i] *= slope;
        }
    }
    if (c->dlogits_dtype != FP32 || cap != 0.0f) store(c, row, start, n, x);
}

// The linear part: of the student's softmax, of the teacher's, of the student's at temperature 1, and what is taken
// from the label's entry: `own` of its cross-entropy, `target` of mixed targets. The sums: factor * (g - total * q).
typedef struct {
    double student, teacher, cold, own, target;
    Sums sums;
} Factors;

static Factors factors_of(const Row *r, const Token *token, const Shares *shares, Sums sums) {
    const double c = shares->z == 0.0 ? shares->ce : shares->ce + 2.0 * shares->z * token->log_sum_exp;
    const double T = r->temperature;
    Factors of = {.teacher = shares->p / T, .own = shares->ce, .target = shares->y / T, .sums = sums};
    of.student = shares->q / T + (r->call->cold ? 0.0 : c);
    of.cold = r->call->cold ? c : 0.0;
    of.sums.factor /= T;
    return of;
}

static void linear_block(const Row *r, int64_t block, const Factors *of, double scale, float *out) {
    const int n = block_length(r, block);
    const float *e_s = r->student.exps + block * BLOCK, *e_t = r->teacher.exps + block * BLOCK;
    const Factor of_s = split(scale * of->student * normaliser(&r->student, block));
    if (of->teacher == 0.0) {
#pragma omp simd
        for (int i = 0; i < n; i++) out[i] = times(e_s[i], of_s);
    } else {
        const Factor of_t = split(scale * of->teacher * normaliser(&r->teacher, block));
#pragma omp simd
        for (int i = 0; i < n; i++) out[i] = times(e_s[i], of_s) - times(e_t[i], of_t);
    }
}

static void add_sums_block(const Row *r, int64_t block, const Factors *of, double scale, bool alone, float *out) {
    const int n = block_length(r, block);
    const float *e_s = r->student.exps + block * BLOCK, *g = of->sums.g + block * BLOCK;
    const float outer = (float)(scale * of->sums.factor);
    const Factor total = split(of->sums.total * normaliser(&r->student, block));
    if (alone) {
#pragma omp simd
        for (int i = 0; i < n; i++) out[i] = outer * (g[i] - times(e_s[i], total));
    } else {
#pragma omp simd
        for (int i = 0; i < n; i++) out[i] += outer * (g[i] - times(e_s[i], total));
    }
}

static void write_gradient(const Row *r, Factors of) {
    const Call *c = r->call;
    const double scale = (double)c->student.scale * (c->weights ? c->weights[r->row] : 1.0f);
    const float own = (float)(scale * of.own), target = (float)(scale * of.target);
    const bool linear = !of.sums.g || of.student != 0.0 || of.teacher != 0.0;
    float buffer[BLOCK], raw_buffer[BLOCK];
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b), label = label_in(r, b);
        const int64_t start = b * BLOCK;
        float *out = gradient_block(c, r->row, start, buffer);
        if (linear) linear_block(r, b, &of, scale, out);
        if (of.sums.g) add_sums_block(r, b, &of, scale, !linear, out);
        if (of.cold != 0.0) {
            const float *e_c = r->cold.exps + start;
            const Factor of_c = split(scale * of.cold * normaliser(&r->cold, b));
#pragma omp simd
            for (int i = 0; i < n; i++) out[i] += times(e_c[i], of_c);
        }
        if (label >= 0) out[label] = (out[label] - own) - target;
        finish_gradient(c, r->row, start, n, out, raw_buffer);
    }
}
