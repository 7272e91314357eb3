// Maxima and sums over the threads of a cluster: shuffles in a warp, a block's warps through its shared memory, the
// cluster's blocks through each other's. All threads of a cluster get the same bits, so they take the same branches.
#pragma once

#include "cuda_math.h"

// One record of a warp's, and later of a block's values.
#define FKD_RECORD 8
#define FKD_RECORD_BYTES (4 * FKD_RECORD)
#define FKD_WARPS (FKD_THREADS / FKD_WARP)
#define FKD_LARGEST_CLUSTER (FKD_WARP < 8 ? FKD_WARP : 8)
// A reduction may begin while others still read the last one's: blocks' records are kept twice.
#define FKD_RECORDS_BYTES (FKD_RECORD_BYTES * (FKD_WARPS + 2 * FKD_LARGEST_CLUSTER))

// A row's statistics: the first four are maxima; sums are relative to them.
enum Statistic { S_MAX, T_MAX, LABEL_S, LABEL_T, S_SUM, T_SUM, KL, COLD };
#define FKD_MAXIMA 4

// Sums relative to `top` instead of the record's own maxima. `k` turns logits into exponents of 2, in which KL counts.
FKD_INLINE void rescale(float *x, const float *top, float k) {
    const float s = x[S_MAX] - top[S_MAX];
    x[S_SUM] *= exp2_fast(s * k);
    if (FKD_COLD) x[COLD] *= exp2_fast(s * LOG2_E);
    if (FKD_TEACHER >= 0) {
        const float t = x[T_MAX] - top[T_MAX], weight = exp2_fast(t * k);
        x[KL] = weight == 0.0f ? 0.0f : weight * (x[KL] + x[T_SUM] * ((t - s) * k));
        x[T_SUM] *= weight;
    }
    FKD_UNROLL for (int i = 0; i < FKD_MAXIMA; i++) x[i] = top[i];
}

FKD_INLINE void no_statistics(float *x) {
    FKD_UNROLL for (int i = 0; i < FKD_RECORD; i++) x[i] = i < FKD_MAXIMA ? OUTSIDE : 0.0f;
}

// One slot's final logits; `z_t` is read where there is a teacher.
FKD_INLINE void add_slot(float *sums, const float *z_s, const float *z_t, float k) {
    float s_max = sums[S_MAX], t_max = sums[T_MAX];
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
        s_max = fmaxf(s_max, z_s[i]);
        if (FKD_TEACHER >= 0) t_max = fmaxf(t_max, z_t[i]);
    }
    const float top[FKD_MAXIMA] = {s_max, t_max, sums[LABEL_S], sums[LABEL_T]};
    rescale(sums, top, k);
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
        const float a_s = (z_s[i] - s_max) * k;
        sums[S_SUM] += exp2_fast(a_s);
        if (FKD_COLD) sums[COLD] += exp2_fast((z_s[i] - s_max) * LOG2_E);
        if (FKD_TEACHER < 0) continue;
        const float a_t = (z_t[i] - t_max) * k, e_t = exp2_fast(a_t);
        sums[T_SUM] += e_t;
        sums[KL] += e_t * (a_t - a_s);  // from the maxima: offsets of the logits cost no digits
    }
}

// Over `lanes` neighbours of a warp. With `maxima`, values are statistics, else all `n` are sums.
FKD_INLINE void join_lanes(float *x, int n, bool maxima, int lanes, float k) {
    const int first = maxima ? FKD_MAXIMA : 0;
    if (maxima) {
        float top[FKD_MAXIMA];
        FKD_UNROLL for (int i = 0; i < FKD_MAXIMA; i++) top[i] = x[i];
        warp_max(top, FKD_MAXIMA);
        rescale(x, top, k);
    }
    FKD_UNROLL for (int mask = lanes / 2; mask > 0; mask /= 2) {
        float other[FKD_RECORD];
        FKD_UNROLL for (int i = first; i < n; i++) other[i] = x[i];
        shuffle_xor(other + first, n - first, mask);
        FKD_UNROLL for (int i = first; i < n; i++) x[i] += other[i];
    }
}

FKD_INLINE void read_record(int offset, bool present, bool maxima, float *x) {
    FKD_UNROLL for (int i = 0; i < FKD_RECORD; i++) x[i] = maxima && i < FKD_MAXIMA ? OUTSIDE : 0.0f;
    if (!present) return;
    const uint4 a = shared_read16(offset), b = shared_read16(offset + 16);
    x[0] = as_float(a.x), x[1] = as_float(a.y), x[2] = as_float(a.z), x[3] = as_float(a.w);
    x[4] = as_float(b.x), x[5] = as_float(b.y), x[6] = as_float(b.z), x[7] = as_float(b.w);
}

// Maxima in `x`; sums in `total`, whose last additions keep the digits that fp32 would lose. `phase` alternates.
FKD_INLINE void reduce(float *x, Pair *total, int n, bool maxima, float k, int *phase) {
    const int lane = thread_index() % FKD_WARP, warp = thread_index() / FKD_WARP, rank = cluster_rank();
    const int arrived = FKD_RECORD_BYTES * (FKD_WARPS + *phase * FKD_LARGEST_CLUSTER);
    *phase ^= 1;
    FKD_UNROLL for (int i = n; i < FKD_RECORD; i++) x[i] = 0.0f;
    join_lanes(x, n, maxima, FKD_WARP, k);
    if (lane == 0) {
        shared_write16(FKD_RECORD_BYTES * warp, words_of(x));
        shared_write16(FKD_RECORD_BYTES * warp + 16, words_of(x + 4));
    }
    block_barrier();
    if (warp == 0) {
        read_record(FKD_RECORD_BYTES * lane, lane < FKD_WARPS, maxima, x);
        join_lanes(x, n, maxima, FKD_WARP, k);
        if (lane < cluster_size()) {
            remote_write16(arrived + FKD_RECORD_BYTES * rank, lane, words_of(x));
            remote_write16(arrived + FKD_RECORD_BYTES * rank + 16, lane, words_of(x + 4));
        }
    }
    cluster_barrier();
    const int block = lane % FKD_LARGEST_CLUSTER, first = maxima ? FKD_MAXIMA : 0;
    read_record(arrived + FKD_RECORD_BYTES * block, block < cluster_size(), maxima, x);
    if (maxima) {
        float top[FKD_MAXIMA];
        FKD_UNROLL for (int i = 0; i < FKD_MAXIMA; i++) top[i] = x[i];
        warp_max(top, FKD_MAXIMA);
        rescale(x, top, k);
    }
    FKD_UNROLL for (int i = 0; i < n - first; i++) total[i] = pair(x[first + i], 0.0f);
    FKD_UNROLL for (int mask = FKD_LARGEST_CLUSTER / 2; mask > 0; mask /= 2) {
        float other[2 * FKD_RECORD];
        FKD_UNROLL for (int i = 0; i < n - first; i++) other[2 * i] = total[i].high, other[2 * i + 1] = total[i].low;
        shuffle_xor(other, 2 * (n - first), mask);
        FKD_UNROLL for (int i = 0; i < n - first; i++) total[i] = add(total[i], pair(other[2 * i], other[2 * i + 1]));
    }
}
