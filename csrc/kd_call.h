// One call of the row on a chunk; a row of it with its thread's scratch; and where the teacher's logits come from.
#pragma once

#include <stdbool.h>

#include "kd_softmax.h"

#ifndef FKD_DIVERGENCES
#error "build through fused_kd.rows.native.build, which defines FKD_DIVERGENCES"
#endif

#define FKD_NAME(name, h, g) FKD_##name,
enum Divergence { CROSS_ENTROPY = -1, FKD_DIVERGENCES(FKD_NAME) };

// A top-k teacher: entries in ascending order, V where there is none; see fused_kd.rows.contract.Sparse.
typedef struct {
    const int64_t *indices;  // (C, K), or NULL: the teacher is dense
    const float *log_probs;  // (C, K)
    const float *rest;       // (C,)
    int64_t K;
    int32_t uniform;
} Lists;

#define FKD_FLOAT(name) float name;

typedef struct {  // mirrored by fused_kd/rows/native/row.py
    int64_t C, V;
    Logits student, teacher;
    Lists lists;
    void *dlogits;  // (C, V), unit stride along V, or NULL; may be the student's logits
    int64_t dlogits_stride;
    int32_t dlogits_dtype;
    int32_t divergence;
    int32_t free, mixture, reads_d, kl_at_one, adaptive, everywhere;  // of the divergence, see fused_kd.divergences.Divergence
    int32_t mixed, hard_label, gated, cold;
    FKD_SCALARS(FKD_FLOAT)  // of fused_kd.objectives.Scalars
    const int64_t *labels;  // (C,)
    const float *weights;   // (C,) or NULL
    const uint8_t *given;   // (C,) which rows are hard, or NULL
    float *loss, *difficulty;
    uint8_t *is_hard;
    char *scratch;  // (threads, fkd_scratch(V, K)), uninitialised, on cache lines
} Call;

typedef struct {
    const Call *call;
    int64_t row, label, blocks;
    Softmax student, teacher, cold;
    double *kl;  // one a block: sum of exp * (teacher - student), each over its block's maximum
    double label_d;     // log(target / student) of the label where its target is mixed
    float beta, alpha;  // the objective's, or of an adaptive divergence this row's
    bool student_above, teacher_above;  // 0, in tokens that the other side excludes
} Row;

static int64_t block_count(int64_t V) { return (V + BLOCK - 1) / BLOCK; }

// Bytes of scratch for one row of V logits, whole cache lines.
static int64_t row_scratch(int64_t V) {
    const size_t a_block = 3 * (BLOCK * sizeof(float) + sizeof(Part)) + sizeof(double);
    return ((int64_t)a_block * block_count(V) + 63) / 64 * 64;
}

static void *take(char **scratch, int64_t count, size_t size) {
    void *taken = *scratch;
    *scratch += (size_t)count * size;
    return taken;
}

static Row new_row(const Call *c, char *scratch) {
    Row r = {.call = c, .blocks = block_count(c->V)};
    Softmax *sides[] = {&r.student, &r.teacher, &r.cold};
    for (int i = 0; i < 3; i++) sides[i]->exps = take(&scratch, r.blocks * BLOCK, sizeof(float));
    for (int i = 0; i < 3; i++) sides[i]->parts = take(&scratch, r.blocks, sizeof(Part));
    r.kl = take(&scratch, r.blocks, sizeof(double));
    return r;
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
