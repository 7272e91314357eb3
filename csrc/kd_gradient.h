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

// Of the student's softmax, of the teacher's or of what has replaced its exponentials, of the student's softmax at
// temperature 1, and what is taken from the label's entry: `own` of its cross-entropy, `target` of mixed targets. Beside
// sums, `student` is what cancels them, and `linear` the rest.
typedef struct {
    double student, teacher, cold, linear, own, target;
    bool has_sums;
} Factors;

// `sums` NULL: there are none.
static Factors factors_of(const Row *r, const Token *token, const Shares *shares, const Sums *sums) {
    const double c = shares->z == 0.0 ? shares->ce : shares->ce + 2.0 * shares->z * token->log_sum_exp;
    const double T = r->temperature;
    Factors of = {.own = shares->ce, .target = shares->y / T, .has_sums = sums};
    const double linear = shares->q / T + (r->call->cold ? 0.0 : c);
    of.student = sums ? -sums->total / T : linear;
    of.linear = sums ? linear : 0.0;
    of.teacher = (sums ? sums->factor : -shares->p) / T;
    if (r->call->cold) of.cold = c;
    return of;
}

static void write_gradient(const Row *r, Factors of) {
    const Call *c = r->call;
    const double scale = (double)c->student.scale * (c->weights ? c->weights[r->row] : 1.0f);
    const float own = (float)(scale * of.own), target = (float)(scale * of.target);
    float buffer[BLOCK], raw_buffer[BLOCK];
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b), label = label_in(r, b);
        const int64_t start = b * BLOCK;
        float *out = gradient_block(c, r->row, start, buffer);
        const float *e_s = r->student.exps + start, *e_t = r->teacher.exps + start, *e_c = r->cold.exps + start;
        const Factor of_s = split(scale * (of.student + of.linear) * normaliser(&r->student, b));
        if (of.teacher == 0.0) {
#pragma omp simd
            for (int i = 0; i < n; i++) out[i] = times(e_s[i], of_s);
        } else if (of.has_sums && fabs(of.student) < 1e30 * fabs(of.teacher)) {
            // Nearly equal, they cancel: scaled afterwards, only the student's part has been rounded before.
            const float outer = (float)(scale * of.teacher);
            const Factor inner = split(of.student / of.teacher * normaliser(&r->student, b));
            const Factor beside = split(scale * of.linear * normaliser(&r->student, b));
#pragma omp simd
            for (int i = 0; i < n; i++) out[i] = outer * (e_t[i] + times(e_s[i], inner)) + times(e_s[i], beside);
        } else {
            const Factor of_t = split(scale * of.teacher * (of.has_sums ? 1.0 : normaliser(&r->teacher, b)));
#pragma omp simd
            for (int i = 0; i < n; i++) out[i] = e_t[i] * of_t.high + (e_t[i] * of_t.low + times(e_s[i], of_s));
        }
        if (of.cold != 0.0) {
            const Factor of_c = split(scale * of.cold * normaliser(&r->cold, b));
#pragma omp simd
            for (int i = 0; i < n; i++) out[i] += times(e_c[i], of_c);
        }
        if (label >= 0) out[label] = (out[label] - own) - target;
        finish_gradient(c, r->row, start, n, out, raw_buffer);
    }
}
