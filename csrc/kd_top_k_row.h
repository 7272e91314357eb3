// A row of a top-k teacher whose tail is not uniform, condensed to categories as fused_kd/rows/top_k.py explains: the
// K listed entries and the rest, a dense row of K + 1 logits.
#pragma once

#include "kd_dense_row.h"

// One row's categories: logits, and their gradients.
typedef struct {
    float *student, *teacher, *gradient;  // (K + 1,), the rest last
    float *cold, *cold_gradient;          // with the rest's logit at temperature 1
    float *listed;                        // the student of a divergence over the list alone, which has no rest
    char *scratch;
} Categories;

static int64_t top_k_scratch(int64_t K, int terms) {
    return K == 0 ? 0 : row_scratch(K + 1, terms) + (6 * (K + 1) * (int64_t)sizeof(float) + 63) / 64 * 64;
}

static Categories new_categories(int64_t K, int terms, char *scratch) {
    Categories x = {.scratch = scratch};
    scratch += row_scratch(K + 1, terms);
    float **arrays[] = {&x.student, &x.teacher, &x.gradient, &x.cold, &x.cold_gradient, &x.listed};
    for (int i = 0; i < 6; i++) *arrays[i] = take(&scratch, K + 1, sizeof(float));
    return x;
}

// The largest logit of the rest before the temperature.
static double top_of(const Softmax *x, double T) {
    if (x->max <= 1.5f * LOG_ZERO) return -INFINITY;  // all are listed
    return x->max <= LOG_ZERO ? LOG_ZERO : x->max * T;
}

// log sum exp at temperature T, times T, less `origin`.
static double log_sum(const Softmax *x, double T, double origin) { return (top_of(x, T) - origin) + x->log_total * T; }

static bool mixes_label(const Call *c) {
    for (int i = 0; i < c->term_count; i++)
        if (c->terms[i].mixed) return true;
    return false;
}

// From the first `count` entries' final logits, over their own largest: over that of all they would lose digits. The
// label that the teacher does not list is one of them where a target holds it.
static void keep_listed(const Row *r, const Categories *small, int64_t count) {
    const int64_t K = r->call->lists.K;
    const float *log_probs = r->call->lists.log_probs + r->row * K;
    const bool all = mixes_label(r->call);
    float top = OUTSIDE;
    for (int64_t j = 0; j < count; j++)
        if ((all || log_probs[j] > -INFINITY) && small->student[j] > top) top = small->student[j];
    for (int64_t j = 0; j <= K; j++) {
        const bool part = j < count && (all || log_probs[j] > -INFINITY);
        small->listed[j] = part ? at_least_log_zero(small->student[j] - top) : LOG_ZERO;
    }
}

// Fill the student's categories; the softmaxes are then of the rest alone.
static void condense(Row *r, const Categories *small) {
    const Call *c = r->call;
    const int64_t K = c->lists.K, *indices = c->lists.indices + r->row * K;
    float buffer[BLOCK], top = LOG_ZERO;
    int64_t next = 0;
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        const int64_t start = b * BLOCK;
        const float *z = student_logits(c, r->row, start, n, buffer);
        const int64_t first = next;
        if (next < K && indices[next] < start + n) {
            if (z != buffer) z = memcpy(buffer, z, (size_t)n * sizeof(float));
            for (; next < K && indices[next] < start + n; next++) {
                small->student[next] = buffer[indices[next] - start];
                if (small->student[next] > top) top = small->student[next];
                buffer[indices[next] - start] = OUTSIDE;  // of the rest
            }
        }
        if (c->cold) add_part(&r->cold, b, z, n);
        z = cooled(z, n, r->temperature, buffer);
        for (int64_t i = first; i < next; i++) buffer[indices[i] - start] = OUTSIDE;
        add_part(&r->student, b, z, n);
    }
    join_parts(&r->student, r->blocks);
    if (c->cold) join_parts(&r->cold, r->blocks);
    if (c->lists.listed) keep_listed(r, small, next);
    // Only differences count: a large common offset would swallow the digits of the rest's logarithm.
    const double rest = top_of(&r->student, r->temperature), origin = rest > top ? rest : top;
    for (int64_t j = 0; j < K; j++)
        small->student[j] = j < next ? at_least_log_zero((float)(small->student[j] - origin)) : LOG_ZERO;
    small->student[K] = at_least_log_zero((float)log_sum(&r->student, r->temperature, origin));
    for (int64_t j = 0; j <= K; j++)
        if (isnan(small->student[j])) small->listed[K] = NAN;  // also what has no part in the divergence
    if (!c->cold) return;
    memcpy(small->cold, small->student, (size_t)K * sizeof(float));
    small->cold[K] = at_least_log_zero((float)log_sum(&r->cold, 1.0, origin));
}

static Call categories_call(const Row *r, const Categories *small, const int64_t *label) {
    const Call *c = r->call;
    const int64_t K = c->lists.K, row = r->row;
    Call call = *c;
    call.C = 1;
    call.V = K + 1;
    call.student = (Logits){.data = small->student, .scale = 1.0f};
    call.teacher = (Logits){.data = small->teacher, .scale = 1.0f};
    call.lists = (Lists){0};
    call.dlogits = c->dlogits ? small->gradient : NULL;
    call.dlogits_dtype = FP32;
    call.cold = false;
    call.scalars = (const float *)scalars_of(c, row);
    call.labels = label;
    if (c->weights) call.weights = c->weights + row;
    if (c->given) call.given = c->given + row;
    call.loss = c->loss + row;
    call.difficulty = c->difficulty + row;
    call.is_hard = c->is_hard + row;
    call.statistics = NULL;
    return call;
}

// The label's cross-entropy at temperature 1 and over the vocabulary: with another rest, it is a row of its own.
static void add_cold_cross_entropy(const Row *r, const Categories *small, Call call) {
    float loss, difficulty;
    uint8_t is_hard;
    call.needs_teacher = false;
    call.student.data = small->cold;
    call.dlogits = r->call->dlogits ? small->cold_gradient : NULL;
    call.loss = &loss, call.difficulty = &difficulty, call.is_hard = &is_hard;
    Row row = new_row(&call, small->scratch);
    set_row(&row, 0);
    cross_entropy_row(&row);
    r->call->loss[r->row] += loss;
    if (!r->call->dlogits) return;
    for (int64_t j = 0; j < r->call->lists.K; j++) small->gradient[j] += small->cold_gradient[j];
}

// The categories' gradient back on the vocabulary: each entry its own, the others their shares of the rest's.
static void expand(const Row *r, const Categories *small) {
    const Call *c = r->call;
    const int64_t K = c->lists.K, *indices = c->lists.indices + r->row * K;
    const float scale = c->student.scale;
    // A rest whose tokens the student excludes has none to give its gradient to.
    const double of_rest = small->student[K] < LOG_ZERO / 2.0f ? 0.0 : scale;
    float buffer[BLOCK], raw_buffer[BLOCK];
    int64_t next = 0;
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        const int64_t start = b * BLOCK;
        float *out = gradient_block(c, r->row, start, buffer);
        const float *e_s = r->student.exps + start, *e_c = r->cold.exps + start;
        const float share = (float)(of_rest * small->gradient[K] * normaliser(&r->student, b));
#pragma omp simd
        for (int i = 0; i < n; i++) out[i] = share * e_s[i];
        if (c->cold) {
            const float cold = (float)(of_rest * small->cold_gradient[K] * normaliser(&r->cold, b));
#pragma omp simd
            for (int i = 0; i < n; i++) out[i] += cold * e_c[i];
        }
        for (; next < K && indices[next] < start + n; next++) out[indices[next] - start] = scale * small->gradient[next];
        finish_gradient(c, r->row, start, n, out, raw_buffer);
    }
}

static void top_k_row(Row *r, const Categories *small) {
    const Call *c = r->call;
    const int64_t K = c->lists.K, offset = r->row * K;
    condense(r, small);
    memcpy(small->teacher, c->lists.log_probs + offset, (size_t)K * sizeof(float));
    small->teacher[K] = c->lists.rest[r->row];
    int64_t label = entries_before(c, r->row, r->label);
    Call call = categories_call(r, small, &label);
    if (c->lists.listed) call.student.data = small->listed;
    Row row = new_row(&call, small->scratch);
    row.without_label = c->cold;
    row.without_target = c->lists.listed && !mixes_label(c);
    set_row(&row, 0);
    distilled_row(&row);
    if (c->cold) add_cold_cross_entropy(r, small, call);
    if (c->dlogits) expand(r, small);
}
