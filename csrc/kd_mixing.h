// A teacher's share in T * log(sum w * p) of rows: fused_kd/rows/mixing.py.
//
// Two sweeps over a row: the sum of its exponentials; then its log-probabilities, added to what is there.
#pragma once

#include "kd_softmax.h"

typedef struct {  // mirrored by fused_kd/rows/native/mixing.py
    int64_t C, V;
    Logits logits;
    float *mixed;  // (C, V), unit stride along V; may be the logits where it is the first teacher
    int64_t mixed_stride;
    const float *log_share, *temperature;
    int64_t share_stride, temperature_stride;  // 0, or from row to row
    int32_t first;                             // whether nothing has been added before
} Mixing;

// x = T * log(exp(x / T) + exp(y / T)), which of -inf twice is -inf.
static void add_logs(float *x, const float *y, int n, float T) {
    const float by = 1.0f / T;
#pragma omp simd
    for (int i = 0; i < n; i++) {
        const float high = x[i] > y[i] ? x[i] : y[i], low = x[i] > y[i] ? y[i] : x[i];
        const float step = low - (high == -INFINITY ? 0.0f : high);
        x[i] = high + T * log_positive(1.0f + exp_nonpositive(step * by));
    }
}

static void mix_row(const Mixing *c, int64_t row) {
    float *mixed = c->mixed + row * c->mixed_stride;
    const float share = c->log_share[row * c->share_stride], T = c->temperature[row * c->temperature_stride];
    if (share == -INFINITY) {
        for (int64_t i = 0; c->first && i < c->V; i++) mixed[i] = -INFINITY;
        return;
    }
    Exponentials of = {T, -INFINITY, 0.0};
    float z[BLOCK];
    for (int64_t start = 0; start < c->V; start += BLOCK) {
        const int n = c->V - start < BLOCK ? (int)(c->V - start) : BLOCK;
        block_logits(&c->logits, row, start, n, z);
        add_exponentials(&of, z, n, largest_of(z, n));
    }
    // Of a row that excludes all tokens -inf, over which its logits are NaN.
    const float top = of.top, norm = (float)(T * (share - log(of.total)));
    for (int64_t start = 0; start < c->V; start += BLOCK) {
        const int n = c->V - start < BLOCK ? (int)(c->V - start) : BLOCK;
        block_logits(&c->logits, row, start, n, z);
        float *out = c->first ? mixed + start : z;
#pragma omp simd
        for (int i = 0; i < n; i++) out[i] = (z[i] - top) + norm;
        if (!c->first) add_logs(mixed + start, z, n, T);
    }
}

typedef struct {
    const Mixing *call;
    atomic_llong next_row;
} MixingWork;

static void work_on_mixing(void *shared) {
    MixingWork *work = shared;
    for (int64_t row; (row = atomic_fetch_add(&work->next_row, 1)) < work->call->C;) mix_row(work->call, row);
}

// `parallel` as of fkd_row.
void fkd_add(const Mixing *call, void (*parallel)(void (*)(void *), void *, unsigned, unsigned), unsigned threads) {
    MixingWork work = {.call = call};
    if (threads > 1)
        parallel(work_on_mixing, &work, threads, 0);
    else
        work_on_mixing(&work);
}
