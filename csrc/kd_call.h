// One call of the row on a chunk; a row of it with its thread's scratch; and where the teacher's logits come from.
#pragma once

#include <stdbool.h>

#include "kd_softmax.h"

#ifndef FKD_DIVERGENCES
#error "build through fused_kd.rows.native.build, which defines FKD_DIVERGENCES"
#endif

#define FKD_NAME(name, h, g) FKD_##name,
enum Divergence { FKD_DIVERGENCES(FKD_NAME) };

#define FKD_TOLD(name) TOLD_##name,
enum Statistic { FKD_STATISTICS(FKD_TOLD) };  // columns, of fused_kd.terms.STATISTICS

#define FKD_FLOAT(name) float name;
#define FKD_INT(name) int32_t name;

// A summand of the loss: what is fixed, of fused_kd.rows.contract.traits, and its numbers, of fused_kd.terms.Scalars.
typedef struct {  // mirrored by fused_kd/rows/native/row.py
    FKD_TRAITS(FKD_INT)
} Term;

typedef struct {
    FKD_SCALARS(FKD_FLOAT)
} Scalars;

// A top-k teacher: entries in ascending order, V where there is none; see fused_kd.rows.contract.Sparse.
typedef struct {
    const int64_t *indices;  // (C, K), or NULL: the teacher is dense
    const float *log_probs;  // (C, K)
    const float *rest;       // (C,)
    int64_t K;
    int32_t uniform, listed;  // tails; of listed ones, both sides are over the list alone
} Lists;

typedef struct {  // mirrored by fused_kd/rows/native/row.py
    int64_t C, V;
    Logits student, teacher;
    Lists lists;
    void *dlogits;  // (C, V), unit stride along V, or NULL; may be the student's logits
    int64_t dlogits_stride;
    int32_t dlogits_dtype;
    int32_t needs_teacher, cold;  // cold: the label's cross-entropy is that of temperature 1, the rest of another
    int32_t term_count, main;     // main: the term of the difficulty; the one with a gate where there is one
    const Term *terms;
    const float *scalars;  // (1 or C, terms, n)
    int64_t scalars_stride;  // 0, or from row to row
    const int64_t *labels;  // (C,)
    const float *weights;   // (C,) or NULL
    const uint8_t *given;   // (C,) which rows are hard, or NULL
    float *loss, *difficulty;
    uint8_t *is_hard;
    float *statistics;  // (C, told) or NULL
    int32_t told;
    char *scratch;  // (threads, fkd_scratch(V, K, terms)), uninitialised, on cache lines
} Call;

// A term that a row takes the sums of, see fused_kd/rows/shares.py.
typedef struct {
    const Term *term;
    const Scalars *own;
    double share;         // of the loss
    float beta, alpha;    // the objective's, or of an adaptive divergence this row's
    float label_d;        // log(target / student) of the label where the target is mixed
    Factor of_w, of_u, of_v;  // of powers of exponentials over the maxima
    float factor;         // of its g
    double sum;           // of its h
} Tabled;

typedef struct {
    const Call *call;
    int64_t row, label, blocks;
    float temperature;
    bool tells_entropy_s, tells_entropy_t;
    bool without_label;   // its own cross-entropy is another row's
    bool without_target;  // no target holds the label: the difficulty is KL(p||q)
    Softmax student, teacher, cold;
    float *sums;  // (V,) multiples of g of several terms
    double *kl;   // one a block: sum of exp * (teacher - student), each over its block's maximum
    bool student_above, teacher_above;  // 0, in tokens that the other side excludes
    Tabled *tabled;
    int tabled_count;
} Row;

// Of the row's terms.
static const Scalars *scalars_of(const Call *c, int64_t row) {
    return (const Scalars *)(c->scalars + row * c->scalars_stride);
}

static int64_t block_count(int64_t V) { return (V + BLOCK - 1) / BLOCK; }

// Bytes of scratch for one row of V logits, whole cache lines.
static int64_t row_scratch(int64_t V, int terms) {
    const size_t a_block = 4 * BLOCK * sizeof(float) + 3 * sizeof(Part) + sizeof(double);
    return ((int64_t)a_block * block_count(V) + terms * (int64_t)sizeof(Tabled) + 63) / 64 * 64;
}

static void *take(char **scratch, int64_t count, size_t size) {
    void *taken = *scratch;
    *scratch += (size_t)count * size;
    return taken;
}

static Row new_row(const Call *c, char *scratch) {
    const bool told = c->statistics, gated = c->terms[c->main].gate == GATE_ENTROPY;
    Row r = {.call = c, .blocks = block_count(c->V), .tells_entropy_s = told, .tells_entropy_t = told || gated};
    Softmax *sides[] = {&r.student, &r.teacher, &r.cold};
    for (int i = 0; i < 3; i++) sides[i]->exps = take(&scratch, r.blocks * BLOCK, sizeof(float));
    r.sums = take(&scratch, r.blocks * BLOCK, sizeof(float));
    for (int i = 0; i < 3; i++) sides[i]->parts = take(&scratch, r.blocks, sizeof(Part));
    r.kl = take(&scratch, r.blocks, sizeof(double));
    r.tabled = take(&scratch, c->term_count, sizeof(Tabled));
    return r;
}

// Turns to another row of the call.
static void set_row(Row *r, int64_t row) {
    const Call *c = r->call;
    r->row = row;
    r->label = c->labels[row];
    r->temperature = c->needs_teacher ? scalars_of(c, row)->temperature : 1.0f;
}

static int block_length(const Row *r, int64_t block) {
    const int64_t rest = r->call->V - block * BLOCK;
    return rest < BLOCK ? (int)rest : BLOCK;
}

// The label's position in the block, or -1.
static int label_in(const Row *r, int64_t block) { return r->label / BLOCK == block ? (int)(r->label % BLOCK) : -1; }

// How many of the row's entries lie before `end`.
static int64_t entries_before(const Call *c, int64_t row, int64_t end) {
    const int64_t *indices = c->lists.indices + row * c->lists.K;
    int64_t low = 0, high = c->lists.K;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (indices[middle] < end)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static inline float at_least_log_zero(float x) { return x < LOG_ZERO ? LOG_ZERO : x; }

typedef const float *LogitsOf(const Call *, int64_t, int64_t, int, float *);

// Logits of the student and, listed with a uniform tail or dense, of the teacher; before the temperature.
static const float *student_logits(const Call *c, int64_t row, int64_t start, int n, float *buffer) {
    return final_logits(&c->student, row, start, n, buffer);
}

static const float *teacher_logits(const Call *c, int64_t row, int64_t start, int n, float *buffer) {
    if (!c->lists.indices) return final_logits(&c->teacher, row, start, n, buffer);
    const int64_t offset = row * c->lists.K;
    const float rest = at_least_log_zero(c->lists.rest[row]);
    for (int i = 0; i < n; i++) buffer[i] = rest;
    for (int64_t j = entries_before(c, row, start), end = entries_before(c, row, start + n); j < end; j++)
        buffer[c->lists.indices[offset + j] - start] = at_least_log_zero(c->lists.log_probs[offset + j]);
    return buffer;
}
