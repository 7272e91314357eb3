// Arithmetic of the CUDA rows, in fp32: sums in two parts where single ones would cost digits, logarithms as
// polynomials because the fast one is inexact near 1.
#pragma once

#ifndef FKD_PRIMITIVES
#define FKD_PRIMITIVES "cuda_primitives.h"
#endif
#include FKD_PRIMITIVES

#define INFINITE as_float(0x7f800000u)
#define LOG2_E 1.44269504f
#define LOG2_E_LOW 1.92596303e-8f  // what it lacks
#define LN_2 0.693147181f

FKD_INLINE uint4 words_of(const float *x) {
    uint4 words;
    words.x = as_bits(x[0]), words.y = as_bits(x[1]), words.z = as_bits(x[2]), words.w = as_bits(x[3]);
    return words;
}

// A number in two parts, the second below the rounding of the first.
typedef struct {
    float high, low;
} Pair;

FKD_INLINE Pair pair(float high, float low) {
    Pair p;
    p.high = high;
    p.low = low;
    return p;
}

FKD_INLINE Pair add(Pair x, Pair y) {
    const float sum = x.high + y.high, of_y = sum - x.high;
    const float lost = (x.high - (sum - of_y)) + (y.high - of_y);
    return pair(sum, lost + (x.low + y.low));
}

FKD_INLINE float whole(Pair x) { return x.high + x.low; }

FKD_INLINE float reciprocal(float x) {
    const float y = reciprocal_fast(x);
    return fmaf(y, fmaf(-x, y, 1.0f), y);
}

// x / y, all but correctly rounded.
FKD_INLINE float quotient(float x, float y) {
    const float inverse = reciprocal_fast(y), ratio = x * inverse;
    return fmaf(inverse, fmaf(-y, ratio, x), ratio);
}

// factor / x. A factor of many elements needs both parts: rounded to one, it would shift all of them alike, and sums
// in which nearly equal probabilities cancel would show it.
FKD_INLINE Pair inverse(Pair x, float factor) {
    const float high = reciprocal(x.high), low = high * (fmaf(-x.high, high, 1.0f) - x.low * high);
    const float product = factor * high;
    return pair(product, fmaf(factor, high, -product) + factor * low);
}

FKD_INLINE float times(float x, Pair factor) { return fmaf(x, factor.high, x * factor.low); }

// log2(e) / T, rounded once: an error of it is one of the temperature.
FKD_INLINE float exponent_scale(float T) {
    const Pair k = inverse(pair(fmaxf(T, 1.0f / COLDEST), 0.0f), LOG2_E);
    return k.high + (k.low + LOG2_E_LOW * fminf(reciprocal(T), COLDEST));
}

FKD_INLINE float log_of(Pair x) { return log_positive(x.high) + x.low * reciprocal(x.high); }

FKD_INLINE float log_or_tiny(float x) { return log_positive(x > TINY ? x : TINY); }

FKD_INLINE float exp_fast(float x) { return exp2_fast(x * LOG2_E); }

// A factor of what may be infinite: nothing of it is nothing.
FKD_INLINE float weighed(float weight, float x) { return weight == 0.0f && x == INFINITE ? 0.0f : weight * x; }

FKD_INLINE float at_least_zero(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN

// As tanh_and_slope, with the special functions of a GPU.
FKD_INLINE float squash(float x, float *slope) {
    const float e = exp_fast(-2.0f * fabsf(x)), inverse = reciprocal(1.0f + e);
    *slope = 4.0f * e * inverse * inverse;
    return fabsf(x) < 0.6f ? tanh_near_zero(x) : copysignf((1.0f - e) * inverse, x);
}
