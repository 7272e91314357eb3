// Elementary functions and conversions, branch-free, so that loops over them vectorise.
#pragma once

#ifdef __CUDACC_RTC__  // knows these functions, but has no system headers
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else
#include <math.h>
#include <stdint.h>
#include <string.h>
#endif

static inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

// exp(x) for x <= 0 within 1.2 ulp; 0 where the result would be subnormal.
static inline float exp_nonpositive(float x) {
    const float shift = 12582912.0f + 127.0f;  // leaves round(x / log 2) + 127 in the low bits
    float shifted = x * 1.44269504f + shift;
    float n = shifted - shift;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 0.001381432f;  // minimax on |r| <= log(2) / 2
    p = p * r + 0.008368851f;
    p = p * r + 0.0416684f;
    p = p * r + 0.1666652f;
    p = p * r + 0.49999994f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return x < -87.0f ? 0.0f : p * as_float(as_bits(shifted) << 23);
}

// log(x) for 1e-37 < x < 1e37 within 1.5 ulp, also near 1.
static inline float log_positive(float x) {
    uint32_t n = (as_bits(x) - as_bits(0.70710678f)) & 0xff800000u;  // exponent of x / sqrt(1/2), times 2**23
    float f = x * as_float(0x3f800000u - n) - 1.0f;                  // a product, not bits: NaN stays NaN
    float p = -0.0763327f;                                           // minimax on [sqrt(1/2), sqrt(2)] - 1
    p = p * f + 0.12762068f;
    p = p * f - 0.13160844f;
    p = p * f + 0.14201736f;
    p = p * f - 0.16623293f;
    p = p * f + 0.20001225f;
    p = p * f - 0.25000823f;
    p = p * f + 0.3333333f;
    p = p * f - 0.5f;
    float exponent = (float)(int32_t)n;  // exact
    p = p * (f * f) + exponent * (-2.12194440e-4f / 8388608.0f);
    return (p + f) + exponent * (0.693359375f / 8388608.0f);
}

// tanh(x) for |x| < 0.6, where 1 - exp(-2|x|) would cancel: an odd polynomial.
static inline float tanh_near_zero(float x) {
    float w = x * x;
    float p = -0.0058951582f * w + 0.0207959718f;
    p = p * w - 0.0537838303f;
    p = p * w + 0.133319241f;
    p = p * w - 0.33333298f;
    return x + x * (w * p);
}

// tanh and its derivative, both within a few ulp of themselves.
static inline float tanh_and_slope(float x, float *slope) {
    float e = exp_nonpositive(-2.0f * fabsf(x));
    float inverse = 1.0f / (1.0f + e);
    *slope = 4.0f * e * inverse * inverse;
    float large = copysignf((1.0f - e) * inverse, x);
    return fabsf(x) < 0.6f ? tanh_near_zero(x) : large;
}

static inline float from_fp16(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    float normal = as_float(magnitude + (112u << 23));
    float subnormal = as_float(magnitude + (113u << 23)) - as_float(113u << 23);
    float special = as_float(magnitude + (224u << 23));  // inf and NaN
    float x = magnitude < (1u << 23) ? subnormal : (magnitude < (31u << 23) ? normal : special);
    return as_float(as_bits(x) | (uint32_t)(half & 0x8000) << 16);
}

static inline uint16_t to_fp16(float x) {  // to nearest, ties to even
    uint32_t sign = as_bits(x) & 0x80000000u, magnitude = as_bits(x) ^ sign;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // the addition rounds
    uint32_t special = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    uint32_t half = magnitude < (113u << 23) ? subnormal : (magnitude < (143u << 23) ? normal : special);
    return (uint16_t)(half | sign >> 16);
}

static inline float from_bf16(uint16_t high) { return as_float((uint32_t)high << 16); }

static inline uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits = as_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0 : rounded);
}
