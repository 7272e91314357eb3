// The k largest logits of rows and the sum of exponentials of all others, slab by slab: fused_kd/rows/largest.py.
//
// The list is a heap with its smallest entry first. A slab is read in blocks; in one with a logit above that entry, the
// cache lines that have such take part in exchanges: what leaves the list takes the place of what enters it.
#pragma once

#include <stdbool.h>

#include "kd_softmax.h"

#define LINE 16  // logits of a cache line

typedef struct {  // mirrored by fused_kd/rows/native/largest.py
    int64_t C, W, k, first;
    Logits logits;
    const float *temperature;
    int64_t temperature_stride;
    float *values;     // (C, k)
    int64_t *indices;  // (C, k)
    float *top, *total;
    char *scratch;  // (threads, fkd_largest_scratch(k)), uninitialised, on cache lines
} Largest;

int64_t fkd_largest_scratch(int64_t k) { return (k * (int64_t)sizeof(uint64_t) + 63) / 64 * 64; }

// In the order of values and, where these are equal, in the inverse one of indices below 2**32.
static inline uint64_t key_of(float value, int64_t index) {
    const uint32_t bits = as_bits(value + 0.0f);  // -0 equals 0
    const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)ordered << 32 | (uint32_t)~index;
}

static inline float value_of(uint64_t key) {
    const uint32_t ordered = (uint32_t)(key >> 32);
    return as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

static inline int64_t index_of(uint64_t key) { return (uint32_t)~key; }

// Puts `key` where entry i was, whose children are heaps.
static void sift(uint64_t *heap, int64_t k, int64_t i, uint64_t key) {
    for (int64_t child; (child = 2 * i + 1) < k; i = child) {
        if (child + 1 < k) child += heap[child + 1] < heap[child];
        if (heap[child] >= key) break;
        heap[i] = heap[child];
    }
    heap[i] = key;
}

static bool any_above(const float *line, float least) {
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int i = 0; i < LINE; i++) found |= line[i] > least;
    return found;
}

// Exchanges a block's logits above `least`, the first of which has vocabulary id `first`, with smaller ones of the list;
// its smallest value, or `least` where that is more.
static float exchange(uint64_t *heap, int64_t k, float *z, float least, int64_t first) {
    for (int start = 0; start < BLOCK; start += LINE) {
        if (!any_above(z + start, least)) continue;
        for (int i = start; i < start + LINE; i++) {
            if (!(z[i] > least)) continue;
            const float left = value_of(heap[0]);
            sift(heap, k, 0, key_of(z[i], first + i));
            z[i] = left;
            const float smallest = value_of(heap[0]);
            if (smallest > least) least = smallest;
        }
    }
    return least;
}

// Below the k-th largest logit of a slab, or -inf: what is above it are few more than k. At least as many lines of
// logits, each a block's length from the next, have their maxima above it.
static float bound_below(const Largest *c, int64_t row) {
    if (c->W < 2 * BLOCK || c->k > BLOCK / 2) return -INFINITY;
    float maxima[BLOCK], buffer[BLOCK];
    for (int i = 0; i < BLOCK; i++) maxima[i] = -INFINITY;
    for (int64_t start = 0; start + BLOCK <= c->W; start += BLOCK) {
        block_logits(&c->logits, row, start, BLOCK, buffer);
#pragma omp simd
        for (int i = 0; i < BLOCK; i++) maxima[i] = buffer[i] > maxima[i] ? buffer[i] : maxima[i];
    }
    float low = -INFINITY, high = largest_of(maxima, BLOCK), by = 1.0f;
    for (int step = 0; step < 16; step++) {
        const float middle = low == -INFINITY ? high - by : low + 0.5f * (high - low);
        int above = 0;
#pragma omp simd reduction(+ : above)
        for (int i = 0; i < BLOCK; i++) above += maxima[i] > middle;
        if (above >= c->k)
            low = middle;
        else
            high = middle, by *= 2.0f;
    }
    return low;
}

static void largest_row(const Largest *c, int64_t row, uint64_t *heap) {
    const int64_t k = c->k;
    float *values = c->values + row * k;
    int64_t *indices = c->indices + row * k;
    for (int64_t j = 0; j < k; j++) heap[j] = key_of(values[j], indices[j]);
    for (int64_t j = k / 2 - 1; j >= 0; j--) sift(heap, k, j, heap[j]);

    float least = k > 0 ? value_of(heap[0]) : INFINITY;
    if (least == -INFINITY) least = bound_below(c, row);
    Exponentials of = {c->temperature[row * c->temperature_stride], c->top[row], c->total[row]};
    float buffer[BLOCK];
    for (int64_t start = 0; start < c->W; start += BLOCK) {
        const int n = c->W - start < BLOCK ? (int)(c->W - start) : BLOCK;
        block_logits(&c->logits, row, start, n, buffer);
        float max = largest_of(buffer, n);
        if (max > least) {
            for (int i = n; i < BLOCK; i++) buffer[i] = -INFINITY;
            least = exchange(heap, k, buffer, least, c->first + start);
            max = largest_of(buffer, n);
        }
        add_exponentials(&of, buffer, n, max);
    }
    c->top[row] = of.top;
    c->total[row] = (float)of.total;
    for (int64_t j = 0; j < k; j++) {
        values[j] = value_of(heap[j]);
        indices[j] = index_of(heap[j]);
    }
}

typedef struct {
    const Largest *call;
    atomic_llong next_row;
    atomic_int next_thread;
} LargestWork;

static void work_on_largest(void *shared) {
    LargestWork *work = shared;
    const Largest *c = work->call;
    uint64_t *heap = (uint64_t *)(c->scratch + atomic_fetch_add(&work->next_thread, 1) * fkd_largest_scratch(c->k));
    for (int64_t row; (row = atomic_fetch_add(&work->next_row, 1)) < c->C;) largest_row(c, row, heap);
}

// `parallel` as of fkd_row.
void fkd_largest(const Largest *call, void (*parallel)(void (*)(void *), void *, unsigned, unsigned), unsigned threads) {
    LargestWork work = {.call = call};
    if (threads > 1)
        parallel(work_on_largest, &work, threads, 0);
    else
        work_on_largest(&work);
}
