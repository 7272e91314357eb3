// One call of the row on a chunk, and what is read of a row beside its logits.
#pragma once

#include "cuda_divergence.h"

typedef struct {
    Rows rows;
    int64_t C;
    const int64_t *labels;
    const float *weights, *scalars;  // weights may be NULL
    int64_t scalars_stride;          // elements from row to row, 0: all rows share them
    float *loss, *difficulty;
    uint8_t *is_hard;
    const uint8_t *given;  // may be NULL
} Call;

FKD_INLINE float scalar(const Call *call, int64_t row, int term, int i) {
    return as_float(global_read4(call->scalars + row * call->scalars_stride + term * SCALARS + i));
}

FKD_INLINE int64_t label_of(const Call *call, int64_t row) {
    const uint2 bits = global_read8(call->labels + row);
    return (int64_t)((uint64_t)bits.y << 32 | bits.x);
}

FKD_INLINE float weight_of(const Call *call, int64_t row) {
    return call->weights ? as_float(global_read4(call->weights + row)) : 1.0f;
}
