// A row's logits and softmax in blocks: blocks and their buffers stay in the first-level cache.
#pragma once

#include "kd_math.h"

#define BLOCK 1024

enum Dtype { FP32, BF16, FP16 };

typedef struct {
    const void *data;  // (C, V), unit stride along V
    int64_t stride;    // elements from row to row
    int32_t dtype;
    int32_t finite;  // no token is excluded
    float scale;
    float softcap;  // 0: none
} Logits;

// Sum of n <= BLOCK elements; the rest of the block is overwritten. Eight short chains a vector lane, continued in
// double: one long chain would lose a digit.
static double sum(float *x, int n) {
    enum { K = BLOCK / 8 };
    memset(x + n, 0, (size_t)(BLOCK - n) * sizeof(float));
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < K; i++) {
        const float *y = x + i;
        total += ((y[0] + y[K]) + (y[2 * K] + y[3 * K])) + ((y[4 * K] + y[5 * K]) + (y[6 * K] + y[7 * K]));
    }
    return total;
}

static const float *raw_logits(const Logits *x, int64_t row, int64_t start, int n, float *buffer) {
    const int64_t offset = row * x->stride + start;
    if (x->dtype == FP32) return (const float *)x->data + offset;
    const uint16_t *half = (const uint16_t *)x->data + offset;
    if (x->dtype == BF16) {
#pragma omp simd
        for (int i = 0; i < n; i++) buffer[i] = from_bf16(half[i]);
    } else {
#pragma omp simd
        for (int i = 0; i < n; i++) buffer[i] = from_fp16(half[i]);
    }
    return buffer;
}

// Final logits before the temperature, in place where nothing is to be done, else in `buffer`.
static const float *final_logits(const Logits *x, int64_t row, int64_t start, int n, float *buffer) {
    const float *z = raw_logits(x, row, start, n, buffer);
    const float scale = x->scale, cap = x->softcap;
    if (cap != 0.0f) {
        const float inner = scale / cap;
#pragma omp simd
        for (int i = 0; i < n; i++) {
            float unused;
            buffer[i] = cap * tanh_and_slope(z[i] * inner, &unused);
        }
        return buffer;
    }
    if (scale != 1.0f) {
#pragma omp simd
        for (int i = 0; i < n; i++) buffer[i] = z[i] * scale;
        z = buffer;
    }
    if (x->finite) return z;
#pragma omp simd
    for (int i = 0; i < n; i++) buffer[i] = z[i] < LOG_ZERO ? LOG_ZERO : z[i];
    return buffer;
}

// A small temperature must not make -inf of log 0: differences of it would be NaN.
static inline float cool(float z, float temperature) {
    const float x = z / temperature;
    return x < LOG_ZERO ? LOG_ZERO : x;
}

static const float *cooled(const float *z, int n, float temperature, float *buffer) {
    if (temperature == 1.0f) return z;
#pragma omp simd
    for (int i = 0; i < n; i++) buffer[i] = cool(z[i], temperature);
    return buffer;
}

static float largest_of(const float *z, int n) {
    float max = -INFINITY;
#pragma omp simd reduction(max : max)
    for (int i = 0; i < n; i++) max = z[i] > max ? z[i] : max;
    return max;
}

// A block's final logits in `buffer`, -inf of excluded tokens.
static void block_logits(const Logits *x, int64_t row, int64_t start, int n, float *buffer) {
    const float *z = final_logits(x, row, start, n, buffer);
    if (x->finite && z == buffer) return;
#pragma omp simd
    for (int i = 0; i < n; i++) buffer[i] = z[i] < EXCLUDED ? -INFINITY : z[i];
}

// A running sum of exp((z - top) / temperature).
typedef struct {
    double temperature;
    float top;  // the largest so far, -inf where there is none
    double total;
} Exponentials;

// With a block's logits, whose largest is `max`; they are overwritten.
static void add_exponentials(Exponentials *x, float *z, int n, float max) {
    if (max > x->top) {
        if (x->total != 0.0) x->total *= exp(((double)x->top - max) / x->temperature);  // NaN stays NaN
        x->top = max;
    }
    const float origin = x->top == -INFINITY ? 0.0f : x->top, by = (float)(1.0 / x->temperature);
#pragma omp simd
    for (int i = 0; i < n; i++) z[i] = exp_nonpositive((z[i] - origin) * by);
    x->total += sum(z, n);
}

typedef struct {
    float max;      // of the block's logits
    double sum;     // of exp(logit - max)
    double spread;  // of exp(logit - max) * (max - logit), where it is asked for
    double weight;  // exp(max - the row's)
} Part;

typedef struct {
    float *exps;  // (V,) exp(logit - its block's maximum)
    Part *parts;  // one a block
    float max;
    double total, log_total;
} Softmax;

static void add_part(Softmax *x, int64_t block, const float *z, int n) {
    float max = -INFINITY, *exps = x->exps + block * BLOCK;
#pragma omp simd reduction(max : max)
    for (int i = 0; i < n; i++) max = z[i] > max ? z[i] : max;
    for (int start = 0; start < n; start += 128) {
        const int end = start + 128 < n ? start + 128 : n;
        // The next block, which its search for the maximum would wait for: 64 bytes each, beyond the row harmless.
        for (int i = start; i < end; i += 16) __builtin_prefetch(z + i + BLOCK, 0, 2);
#pragma omp simd
        for (int i = start; i < end; i++) exps[i] = exp_nonpositive(z[i] - max);
    }
    x->parts[block].max = max;
    x->parts[block].sum = sum(exps, n);
}

static void join_parts(Softmax *x, int64_t blocks) {
    x->max = x->parts[0].max;
    for (int64_t b = 1; b < blocks; b++) x->max = x->parts[b].max > x->max ? x->parts[b].max : x->max;
    x->total = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        Part *part = &x->parts[b];
        part->weight = exp((double)part->max - x->max);
        x->total += part->weight * part->sum;
    }
    x->log_total = log(x->total);
}

// What entropies are made of, of a block that has been added.
static void add_spread(Softmax *x, int64_t block, const float *z, int n) {
    const float *exps = x->exps + block * BLOCK, max = x->parts[block].max;
    float terms[BLOCK];
#pragma omp simd
    for (int i = 0; i < n; i++) terms[i] = exps[i] * (max - z[i]);
    x->parts[block].spread = sum(terms, n);
}

// sum p * -log p: summands of one sign, so that nothing cancels.
static double entropy(const Softmax *x, int64_t blocks) {
    double spread = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        const Part *part = &x->parts[b];
        if (part->weight > 0.0) spread += part->weight * (part->spread + part->sum * ((double)x->max - part->max));
    }
    return spread / x->total + x->log_total;
}

static double log_sum_exp(const Softmax *x) { return x->max + x->log_total; }

static double log_probability(const Softmax *x, float z) { return ((double)z - x->max) - x->log_total; }

// A factor of many elements in two parts: rounded to one, it would shift all of them alike, and sums in which nearly
// equal probabilities cancel would show it.
typedef struct {
    float high, low;
} Factor;

static Factor split(double factor) {
    const float high = (float)factor;
    return (Factor){high, (float)(factor - high)};
}

static inline float times(float x, Factor factor) { return x * factor.high + x * factor.low; }

// Turns the block's exponentials into probabilities.
static double normaliser(const Softmax *x, int64_t block) { return x->parts[block].weight / x->total; }
