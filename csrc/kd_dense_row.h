// A row of a dense teacher: the sweeps of csrc/kd_row.c.
#pragma once

#include "kd_call.h"

// ---- sweep 2

#define INLINE inline __attribute__((always_inline))

static INLINE void formulas(const int divergence, float t, float q, float d, float r, float log_r, float s,
                            float log_s, float beta, float alpha, float *h, float *g) {
#define FKD_CASE(name, H, G) \
    case FKD_##name:         \
        *h = (H);            \
        *g = (G);            \
        break;
    switch (divergence) { FKD_DIVERGENCES(FKD_CASE) }
}

// h and g of a block. Inlined once a divergence, so that what it does not read costs nothing.
static INLINE void evaluate(const int divergence, int n, const float *restrict t, const float *restrict q,
                            const float *restrict d, float beta, float alpha, float *restrict h, float *restrict g) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        float raised = q[i] + TINY;
        // beta * q + alpha * t from the side with the larger share, whose rounding would be that of all of them.
        float m = beta < 0.5f ? t[i] + beta * (raised - t[i]) : raised + alpha * (t[i] - raised);
        float r = t[i] / m, s = raised / m;
        formulas(divergence, t[i], q[i], d[i], r, log_positive(r), s, log_positive(s), beta, alpha, &h[i], &g[i]);
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
    if (label >= 0) t[label] += c->rest;
    if (!d || !c->reads_d) return;
    float buffer_s[BLOCK], buffer_t[BLOCK];
    const float *z_s = cooled(student_logits(c, r->row, block * BLOCK, n, buffer_s), n, c->temperature, buffer_s);
    const float *z_t = teacher_logits(c, r->row, block * BLOCK, n, buffer_t);
    bool out[BLOCK];
    const bool teacher_excludes = !c->teacher.finite && r->teacher.max >= cool(EXCLUDED, c->temperature);
    if (teacher_excludes)
        for (int i = 0; i < n; i++) out[i] = z_t[i] < EXCLUDED;
    z_t = cooled(z_t, n, c->temperature, buffer_t);
    const float max_s = r->student.max, max_t = r->teacher.max;
    float offset = (float)(r->student.log_total - r->teacher.log_total);
    if (c->mixed) offset += c->log_lam;
#pragma omp simd
    for (int i = 0; i < n; i++) d[i] = ((z_t[i] - max_t) - (z_s[i] - max_s)) + offset;
    if (teacher_excludes)
        for (int i = 0; i < n; i++) d[i] = out[i] ? LEFT_OUT : d[i];
    if (label >= 0) d[label] = (float)r->label_d;
}

// The shares of sum |t - q| in the head of t, its most probable entries up to `fraction` of the mass and the top, and in
// the rest.
static void head_share(Row *r) {
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
    double head = 0.0, tail = 0.0, head_top = 0.0;
    for (int64_t b = 0; b < r->blocks; b++) {
        arguments(r, b, t, q, NULL);
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
    r->beta = total == 0.0 ? 0.5f : (float)(head / total);
    r->alpha = total == 0.0 ? 0.5f : (float)(tail / total);
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
        evaluate(FKD_##name, n, t, q, d, r->beta, r->alpha, h, g); \
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

typedef const float *Side(const Call *, int64_t, int64_t, int, float *);

// The label's final logit; beyond the row it counts as an excluded token.
static float label_logit(const Row *r, Side *logits) {
    float buffer;
    return r->label < r->call->V ? *logits(r->call, r->row, r->label, 1, &buffer) : LOG_ZERO;
}

// -log of the label's probability, of its final logit before the temperature; infinite where it is excluded.
static double cross_entropy(const Softmax *x, float z, float temperature) {
    const bool uniform = x->max < cool(EXCLUDED, temperature);  // nothing but excluded tokens
    return z < EXCLUDED && !uniform ? x->log_total + INFINITY : -log_probability(x, cool(z, temperature));
}

// A factor of what may be infinite: nothing of it is nothing.
static double weighed(double weight, double value) { return weight == 0.0 && isinf(value) ? 0.0 : weight * value; }

static void cross_entropy_row(Row *r) {
    const Call *c = r->call;
    float buffer[BLOCK];
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        add_part(&r->student, b, student_logits(c, r->row, b * BLOCK, n, buffer), n);
    }
    join_parts(&r->student, r->blocks);
    c->loss[r->row] = c->difficulty[r->row] = 
        (float)cross_entropy(&r->student, label_logit(r, student_logits), 1.0f);
    c->is_hard[r->row] = 0;
    if (c->dlogits) write_gradient(r, (Gradient){.labels = 1.0});
}

// The largest of n logits of one side where the other excludes the token, and `top`.
static float largest_beside(const float *z, const float *other, int n, float top) {
#pragma omp simd reduction(max : top)
    for (int i = 0; i < n; i++) top = other[i] < EXCLUDED && z[i] > top ? z[i] : top;
    return top;
}

// Whether x is above 0 at the largest of its logits where the other side excludes tokens, if it excludes but some.
static bool above_zero(const Softmax *x, float z, const Softmax *other, float temperature) {
    const bool some = z > -INFINITY && other->max >= cool(EXCLUDED, temperature);
    return some && log_probability(x, cool(z, temperature)) > LOG_LEAST;
}

// Sweep 1: both softmaxes, and KL(teacher||student), whose difference form cancels less than two expectations.
static double statistics(Row *r) {
    const Call *c = r->call;
    float buffer_s[BLOCK], buffer_t[BLOCK], terms[BLOCK];
    float top_s = -INFINITY, top_t = -INFINITY;
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        const float *z_s = student_logits(c, r->row, b * BLOCK, n, buffer_s);
        if (c->cold) add_part(&r->cold, b, z_s, n);
        const float *z_t = teacher_logits(c, r->row, b * BLOCK, n, buffer_t);
        if (!c->student.finite) top_t = largest_beside(z_t, z_s, n, top_t);
        if (!c->teacher.finite) top_s = largest_beside(z_s, z_t, n, top_s);
        z_s = cooled(z_s, n, c->temperature, buffer_s);
        z_t = cooled(z_t, n, c->temperature, buffer_t);
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
    r->student_above = above_zero(&r->student, top_s, &r->teacher, c->temperature);
    r->teacher_above = above_zero(&r->teacher, top_t, &r->student, c->temperature);
    double kl = 0.0;
    for (int64_t b = 0; b < r->blocks; b++) {
        const Part *s = &r->student.parts[b], *t = &r->teacher.parts[b];
        const double apart = ((double)t->max - r->teacher.max) - ((double)s->max - r->student.max);
        kl += t->weight * (r->kl[b] + t->sum * apart);
    }
    kl = kl / r->teacher.total - (r->teacher.log_total - r->student.log_total);
    if (r->teacher_above) kl += INFINITY;
    return kl < 0.0 ? 0.0 : kl;
}

static void distilled_row(Row *r) {
    const Call *c = r->call;
    const double lam = c->lam, rest = c->rest, T = c->temperature;
    const float z_s = label_logit(r, student_logits), z_t = label_logit(r, teacher_logits);
    const double kl = statistics(r);
    const double log_q = log_probability(&r->student, cool(z_s, c->temperature));
    const double log_p = log_probability(&r->teacher, cool(z_t, c->temperature));
    const double p = exp(log_p), t = lam * p + rest, log_t = log(t > TINY ? t : TINY);
    double ce = cross_entropy(&r->student, z_s, c->temperature);
    double difficulty = weighed(lam, kl - p * (log_p - log_q)) + t * (log_t - log_q) + lam * c->log_lam * (1.0 - p);
    if (rest > 0.0 && isinf(ce)) difficulty += INFINITY;
    difficulty = difficulty < 0.0 ? 0.0 : difficulty;
    const bool hard = c->gated && (c->given ? c->given[r->row] : (float)difficulty > c->gamma);
    c->difficulty[r->row] = (float)difficulty;
    c->is_hard[r->row] = hard;

    const double share = c->mixed ? 1.0 : lam, label_share = c->hard_label ? rest : 0.0;
    if (c->cold) ce = cross_entropy(&r->cold, z_s, 1.0f);
    const bool at_kl = c->free || (c->kl_at_one && c->alpha == 0.0f) || (c->gated && !hard);
    double loss, g_total = -1.0;
    if (at_kl) {
        loss = c->mixed ? difficulty : weighed(share, kl) + weighed(label_share, ce);
    } else {
        r->label_d = log_t - log_q;
        r->beta = c->beta, r->alpha = c->alpha;
        if (c->adaptive) head_share(r);
        double value = divergence_value(r, &g_total);
        if (c->everywhere && r->student_above && (!c->adaptive || c->fraction < 1.0f)) value += INFINITY;
        if (c->adaptive && r->teacher_above && r->beta > 0.0f) value += INFINITY;
        loss = weighed(share, value) + weighed(label_share, ce);
    }
    c->loss[r->row] = (float)loss;
    if (!c->dlogits) return;
    Gradient gradient = {.divergence = share / T, .g_total = g_total, .labels = label_share, .has_g = !at_kl};
    if (at_kl) {
        gradient.target_share = c->mixed ? lam : 1.0;
        gradient.at_label = c->mixed ? share / T * rest : 0.0;
    }
    write_gradient(r, gradient);
}
