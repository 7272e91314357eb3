// A row of a dense teacher: the sweeps of csrc/kd_row.c.
#pragma once

#include "kd_call.h"

// ---- sweep 2

#define INLINE inline __attribute__((always_inline))

static INLINE void formulas(const int divergence, float t, float q, float d, float r, float log_r, float s,
                            float log_s, float beta, float *h, float *g) {
#define FKD_CASE(name, H, G) \
    case FKD_##name:         \
        *h = (H);            \
        *g = (G);            \
        break;
    switch (divergence) { FKD_DIVERGENCES(FKD_CASE) }
}

// h and g of a block. Inlined once a divergence, so that what it does not read costs nothing.
static INLINE void evaluate(const int divergence, int n, const float *restrict t, const float *restrict q,
                            const float *restrict d, float beta, float *restrict h, float *restrict g) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        float raised = q[i] + TINY;
        // beta * q + (1 - beta) * t without the rounding of 1 - beta.
        float m = beta < 0.5f ? t[i] + beta * (raised - t[i]) : raised + (1.0f - beta) * (t[i] - raised);
        float r = t[i] / m, s = raised / m;
        formulas(divergence, t[i], q[i], d[i], r, log_positive(r), s, log_positive(s), beta, &h[i], &g[i]);
    }
}

// Target, student and, where wanted and read, log(target / student) of a block: t, q, d of fused_kd/divergences.py.
static void arguments(const Row *r, int64_t block, float *restrict t, float *restrict q, float *restrict d) {
    const Call *c = r->call;
    const int n = block_length(r, block), label = c->mixed ? label_in(r, block) : -1;
    const float *e_s = r->student.exps + block * BLOCK, *e_t = r->teacher.exps + block * BLOCK;
    const Factor norm_s = split(normaliser(&r->student, block));
    const Factor norm_t = split(normaliser(&r->teacher, block) * (c->mixed ? c->lam : 1.0f));
    const float tiny = c->mixture ? TINY : 0.0f;
#pragma omp simd
    for (int i = 0; i < n; i++) {
        q[i] = times(e_s[i], norm_s);
        t[i] = times(e_t[i], norm_t) + tiny;
    }
    if (label >= 0) t[label] += 1.0f - c->lam;
    if (!d || !c->reads_d) return;
    float buffer_s[BLOCK], buffer_t[BLOCK];
    const float *z_s = cooled(student_logits(c, r->row, block * BLOCK, n, buffer_s), n, c->temperature, buffer_s);
    const float *z_t = cooled(teacher_logits(c, r->row, block * BLOCK, n, buffer_t), n, c->temperature, buffer_t);
    const float max_s = r->student.max, max_t = r->teacher.max;
    float offset = (float)(r->student.log_total - r->teacher.log_total);
    if (c->mixed) offset += c->lam > 0.0f ? logf(c->lam) : LOG_ZERO;
#pragma omp simd
    for (int i = 0; i < n; i++) d[i] = ((z_t[i] - max_t) - (z_s[i] - max_s)) + offset;
    if (label >= 0) d[label] = (float)r->label_d;
}

// The share of sum |t - q| in the head of t: its most probable entries up to `fraction` of the mass, and the top.
static float head_share(const Row *r) {
    const Call *c = r->call;
    float t[BLOCK], q[BLOCK];
    // The largest t left out, found ten bits at a time from the mass of each digit's entries. Floats of [0, 2) order
    // as their bits do, which then fit 30.
    double mass[1024], inside = 0.0;
    uint32_t left_out = 0;
    bool all = c->fraction >= 1.0f;
    for (int shift = 20; shift >= 0 && !all; shift -= 10) {
        memset(mass, 0, sizeof mass);
        for (int64_t b = 0; b < r->blocks; b++) {
            arguments(r, b, t, q, NULL);
            for (int i = 0, n = block_length(r, b); i < n; i++) {
                uint32_t bits = as_bits(t[i]);
                if ((uint64_t)bits >> (shift + 10) == left_out) mass[(bits >> shift) & 1023] += t[i];
            }
        }
        int digit = 1023;
        for (; digit >= 0 && inside + mass[digit] <= c->fraction; digit--) inside += mass[digit];
        all = shift == 20 && digit < 0;
        left_out = left_out << 10 | (uint32_t)(digit > 0 ? digit : 0);  // below 0 by rounding alone
    }
    const float bound = all ? -1.0f : as_float(left_out);
    float top = 0.0f;
    double head = 0.0, head_top = 0.0, total = 0.0;
    for (int64_t b = 0; b < r->blocks; b++) {
        arguments(r, b, t, q, NULL);
        for (int i = 0, n = block_length(r, b); i < n; i++) {
            const float error = fabsf(t[i] - q[i]);
            total += error;
            if (t[i] > bound) head += error;
            if (t[i] > top) top = t[i], head_top = 0.0;
            if (t[i] == top) head_top += error;
        }
    }
    if (top <= bound) head = head_top;
    return total > 0.0 ? (float)(head / total) : (float)(total + 0.5);  // NaN stays NaN
}

// sum h; g into the teacher's exponentials and sum g.
static double divergence_value(Row *r, double *g_total) {
    const Call *c = r->call;
    float t[BLOCK], q[BLOCK], d[BLOCK], h[BLOCK];
    double h_total = 0.0;
    *g_total = 0.0;
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        float *g = r->teacher.exps + b * BLOCK;
        arguments(r, b, t, q, d);
#define FKD_EVALUATE(name, H, G)                         \
    case FKD_##name:                                     \
        evaluate(FKD_##name, n, t, q, d, r->beta, h, g); \
        break;
        switch (c->divergence) { FKD_DIVERGENCES(FKD_EVALUATE) }
        h_total += sum(h, n);
        *g_total += sum(g, n);
    }
    return h_total;
}

// ---- sweep 3

// dz = divergence * (g - q * g_total) + labels * (q_c - y) - at_label * y, with q_c the softmax at temperature 1.
typedef struct {
    double divergence, g_total, labels, at_label;
    bool has_g;  // g has replaced the teacher's exponentials; else g = -target_share * p
    double target_share;
} Gradient;

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

static void write_gradient(const Row *r, Gradient gradient) {
    const Call *c = r->call;
    const double scale = (double)c->student.scale * (c->weights ? c->weights[r->row] : 1.0f);
    const float outer = (float)(scale * gradient.divergence), total = (float)gradient.g_total;
    const float labels = (float)(scale * gradient.labels), at_label = (float)(scale * gradient.at_label);
    const float labels_q = c->cold ? 0.0f : labels;
    float buffer[BLOCK], raw_buffer[BLOCK];
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b), label = label_in(r, b);
        const int64_t start = b * BLOCK;
        float *out = gradient_block(c, r->row, start, buffer);
        const float *e_s = r->student.exps + start, *e_t = r->teacher.exps + start, *e_c = r->cold.exps + start;
        const Factor norm_s = split(normaliser(&r->student, b));
        if (outer == 0.0f) {
#pragma omp simd
            for (int i = 0; i < n; i++) out[i] = labels_q * times(e_s[i], norm_s);
        } else {
            const Factor of_g = split(gradient.has_g ? 1.0 : -gradient.target_share * normaliser(&r->teacher, b));
#pragma omp simd
            for (int i = 0; i < n; i++) {
                const float q = times(e_s[i], norm_s);
                out[i] = outer * (times(e_t[i], of_g) - q * total) + labels_q * q;
            }
        }
        if (c->cold) {
            const Factor norm_c = split(normaliser(&r->cold, b));
#pragma omp simd
            for (int i = 0; i < n; i++) out[i] += labels * times(e_c[i], norm_c);
        }
        if (label >= 0) out[label] = (out[label] - labels) - at_label;
        finish_gradient(c, r->row, start, n, out, raw_buffer);
    }
}

// ---- a row

static float loss_value(double loss) { return loss > EXCLUDED ? INFINITY : (float)loss; }

typedef const float *Side(const Call *, int64_t, int64_t, int, float *);

// The label's final logit; beyond the row it counts as an excluded token.
static float label_logit(const Row *r, Side *logits) {
    float buffer;
    return r->label < r->call->V ? *logits(r->call, r->row, r->label, 1, &buffer) : LOG_ZERO;
}

static void cross_entropy_row(Row *r) {
    const Call *c = r->call;
    float buffer[BLOCK];
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        add_part(&r->student, b, student_logits(c, r->row, b * BLOCK, n, buffer), n);
    }
    join_parts(&r->student, r->blocks);
    c->loss[r->row] = c->difficulty[r->row] = loss_value(-log_probability(&r->student, label_logit(r, student_logits)));
    c->is_hard[r->row] = 0;
    if (c->dlogits) write_gradient(r, (Gradient){.labels = 1.0});
}

// Sweep 1: both softmaxes, and KL(teacher||student), whose difference form cancels less than two expectations.
static double statistics(Row *r) {
    const Call *c = r->call;
    float buffer_s[BLOCK], buffer_t[BLOCK], terms[BLOCK];
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        const float *z_s = student_logits(c, r->row, b * BLOCK, n, buffer_s);
        if (c->cold) add_part(&r->cold, b, z_s, n);
        z_s = cooled(z_s, n, c->temperature, buffer_s);
        const float *z_t = cooled(teacher_logits(c, r->row, b * BLOCK, n, buffer_t), n, c->temperature, buffer_t);
        add_part(&r->student, b, z_s, n);
        add_part(&r->teacher, b, z_t, n);
        const float max_s = r->student.parts[b].max, max_t = r->teacher.parts[b].max;
        const float *e_t = r->teacher.exps + b * BLOCK;
#pragma omp simd
        for (int i = 0; i < n; i++) terms[i] = e_t[i] * ((z_t[i] - max_t) - (z_s[i] - max_s));
        r->kl[b] = sum(terms, n);
    }
    join_parts(&r->student, r->blocks);
    join_parts(&r->teacher, r->blocks);
    if (c->cold) join_parts(&r->cold, r->blocks);
    double kl = 0.0;
    for (int64_t b = 0; b < r->blocks; b++) {
        const Part *s = &r->student.parts[b], *t = &r->teacher.parts[b];
        const double apart = ((double)t->max - r->teacher.max) - ((double)s->max - r->student.max);
        kl += t->weight * (r->kl[b] + t->sum * apart);
    }
    kl = kl / r->teacher.total - (r->teacher.log_total - r->student.log_total);
    return kl < 0.0 ? 0.0 : kl;
}

static void distilled_row(Row *r) {
    const Call *c = r->call;
    const double lam = c->lam, T = c->temperature;
    const float z_s = label_logit(r, student_logits), z_t = label_logit(r, teacher_logits);
    const double kl = statistics(r);
    const double log_q = log_probability(&r->student, cool(z_s, c->temperature));
    const double log_p = log_probability(&r->teacher, cool(z_t, c->temperature));
    const double p = exp(log_p), t = lam * p + (1.0 - lam), log_t = log(t > TINY ? t : TINY);
    double difficulty = lam * (kl - p * (log_p - log_q)) + t * (log_t - log_q);
    if (lam > 0.0) difficulty += lam * log(lam) * (1.0 - p);
    difficulty = difficulty < 0.0 ? 0.0 : difficulty;
    const bool hard = c->gated && (c->given ? c->given[r->row] : loss_value(difficulty) > c->gamma);
    c->difficulty[r->row] = loss_value(difficulty);
    c->is_hard[r->row] = hard;

    const double share = c->mixed ? 1.0 : lam, label_share = c->hard_label ? 1.0 - lam : 0.0;
    const double ce = c->cold ? -log_probability(&r->cold, z_s) : -log_q;
    const bool at_kl = c->free || (c->kl_at_one && c->beta >= 1.0f) || (c->gated && !hard);
    double loss, g_total = -1.0;
    if (at_kl) {
        loss = c->mixed ? difficulty : share * kl + label_share * ce;
    } else {
        r->label_d = log_t - log_q;
        r->beta = c->adaptive ? head_share(r) : c->beta;
        loss = share * divergence_value(r, &g_total) + label_share * ce;
    }
    c->loss[r->row] = loss_value(loss);
    if (!c->dlogits) return;
    Gradient gradient = {.divergence = share / T, .g_total = g_total, .labels = label_share, .has_g = !at_kl};
    if (at_kl) {
        gradient.target_share = c->mixed ? lam : 1.0;
        gradient.at_label = c->mixed ? share / T * (1.0 - lam) : 0.0;
    }
    write_gradient(r, gradient);
}
