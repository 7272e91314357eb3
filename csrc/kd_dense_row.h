// A row of a dense teacher or of none: sweep 1 of csrc/kd_row.c, and what follows from it.
#pragma once

#include "kd_gradient.h"
#include "kd_statistics.h"

// The label's final logit; beyond the row it counts as an excluded token.
static float label_logit(const Row *r, LogitsOf *logits) {
    float buffer;
    return r->label < r->call->V ? *logits(r->call, r->row, r->label, 1, &buffer) : LOG_ZERO;
}

// -log of the label's probability, of its final logit before the temperature; infinite where it is excluded.
static double cross_entropy(const Softmax *x, float z, float temperature) {
    const bool uniform = x->max < cool(EXCLUDED, temperature);  // nothing but excluded tokens
    return z < EXCLUDED && !uniform ? x->log_total + INFINITY : -log_probability(x, cool(z, temperature));
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
static double compare(Row *r) {
    const Call *c = r->call;
    const float T = r->temperature;
    float buffer_s[BLOCK], buffer_t[BLOCK], terms[BLOCK];
    float top_s = -INFINITY, top_t = -INFINITY;
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        const float *z_s = student_logits(c, r->row, b * BLOCK, n, buffer_s);
        if (c->cold) add_part(&r->cold, b, z_s, n);
        const float *z_t = teacher_logits(c, r->row, b * BLOCK, n, buffer_t);
        if (!c->student.finite) top_t = largest_beside(z_t, z_s, n, top_t);
        if (!c->teacher.finite) top_s = largest_beside(z_s, z_t, n, top_s);
        z_s = cooled(z_s, n, T, buffer_s);
        z_t = cooled(z_t, n, T, buffer_t);
        add_part(&r->student, b, z_s, n);
        add_part(&r->teacher, b, z_t, n);
        const float max_s = r->student.parts[b].max, max_t = r->teacher.parts[b].max;
        if (r->tells_entropy_s) add_spread(&r->student, b, z_s, n);
        if (r->tells_entropy_t) add_spread(&r->teacher, b, z_t, n);
        const float *e_t = r->teacher.exps + b * BLOCK;
#pragma omp simd
        for (int i = 0; i < n; i++) terms[i] = e_t[i] * ((z_t[i] - max_t) - (z_s[i] - max_s));
        r->kl[b] = sum(terms, n);
    }
    join_parts(&r->student, r->blocks);
    join_parts(&r->teacher, r->blocks);
    if (c->cold) join_parts(&r->cold, r->blocks);
    r->student_above = above_zero(&r->student, top_s, &r->teacher, T);
    r->teacher_above = above_zero(&r->teacher, top_t, &r->student, T);
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

// Without a teacher: the label's cross-entropy and the square of the log-sum-exp.
static void cross_entropy_row(Row *r) {
    const Call *c = r->call;
    float buffer[BLOCK];
    for (int64_t b = 0; b < r->blocks; b++) {
        const int n = block_length(r, b);
        const float *z = student_logits(c, r->row, b * BLOCK, n, buffer);
        add_part(&r->student, b, z, n);
        if (r->tells_entropy_s) add_spread(&r->student, b, z, n);
    }
    join_parts(&r->student, r->blocks);
    const float z_s = label_logit(r, student_logits);
    const double ce = cross_entropy(&r->student, z_s, 1.0f);
    const Token token = {.ce = ce, .log_q = log_probability(&r->student, z_s), .log_sum_exp = log_sum_exp(&r->student)};
    Shares shares = {0};
    add_own_loss(r, &token, &shares);
    c->loss[r->row] = (float)shares.loss;
    c->difficulty[r->row] = (float)ce;
    c->is_hard[r->row] = 0;
    if (c->statistics) tell(r, &token, false);
    if (c->dlogits) write_gradient(r, factors_of(r, &token, &shares, (Sums){0}));
}

static void distilled_row(Row *r) {
    const Call *c = r->call;
    const float T = r->temperature, z_s = label_logit(r, student_logits), z_t = label_logit(r, teacher_logits);
    Token token = {.kl = compare(r)};
    token.log_q = log_probability(&r->student, cool(z_s, T));
    token.log_p = log_probability(&r->teacher, cool(z_t, T));
    token.warm_ce = cross_entropy(&r->student, z_s, T);
    token.ce = c->cold ? cross_entropy(&r->cold, z_s, 1.0f) : token.warm_ce;
    token.log_sum_exp = log_sum_exp(c->cold ? &r->cold : &r->student);
    const double difficulty = r->without_target ? token.kl : mixed_kl(&token, scalars_of(c, r->row) + c->main);
    const bool hard = is_hard(r, &token, difficulty);
    c->difficulty[r->row] = (float)difficulty;
    c->is_hard[r->row] = hard;
    Shares shares = loss_shares(r, &token, difficulty, hard);
    if (c->statistics) tell(r, &token, true);
    Sums sums = {0};
    if (r->tabled_count > 0) sums = add_sums(r, &token, &shares, c->dlogits != NULL);
    c->loss[r->row] = (float)shares.loss;
    if (c->dlogits) write_gradient(r, factors_of(r, &token, &shares, sums));
}
