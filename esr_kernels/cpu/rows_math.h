/* Elementwise fp32 arithmetic: exponentials, logarithms, and the divergences other than mixes of the
 * two KLs. Without branches, so that loops over these functions vectorize.
 */
#pragma once
#include "structures.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")

INLINE float bits_to_float(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int32_t float_to_bits(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Reduces x in [-87, 88] to n ln 2 + r with |r| <= ln 2 / 2. Returns exp(r) - 1 by its Taylor series
 * (the next term is at most 6e-9) and stores 2^n in `scale`. NaN gives NaN. */
INLINE float expm1_reduced(float x, float *scale) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float n = (x * 1.44269504f + magic) - magic;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float tail = 1.98412698e-4f;
    tail = tail * r + 1.38888889e-3f;
    tail = tail * r + 8.33333333e-3f;
    tail = tail * r + 4.16666667e-2f;
    tail = tail * r + 1.66666667e-1f;
    tail = tail * r + 0.5f;
    *scale = bits_to_float(((int32_t)n + 127) << 23);
    return r + r * r * tail;
}

/* exp(x) for x <= 88; 0 below -87, where the result would be subnormal. */
INLINE float exp_(float x) {
    float scale, inside = x < -87.0f ? -87.0f : x;
    float value = expm1_reduced(inside, &scale);
    value = value * scale + scale;
    return x < -87.0f ? 0.0f : value;
}

INLINE float expm1_(float x) {
    float scale, inside = x < -87.0f ? -87.0f : x;
    float value = expm1_reduced(inside, &scale);
    return value * scale + (scale - 1.0f);
}

/* log(1 + y) for finite y > -1, accurate in relative terms for small y too. */
INLINE float log1p_(float y) {
    float u = 1.0f + y;
    float lost = (y - (u - 1.0f)) / u; /* rounding error of 1 + y */
    lost = u > 1e8f ? 0.0f : lost;
    int32_t bits = float_to_bits(u);
    int32_t k = (bits - 0x3f3504f3) >> 23; /* u = 2^k * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2) */
    float f = bits_to_float(bits - (int32_t)((uint32_t)k << 23)) - 1.0f;
    float z = 7.0376836292e-2f;
    z = z * f - 1.1514610310e-1f;
    z = z * f + 1.1676998740e-1f;
    z = z * f - 1.2420140846e-1f;
    z = z * f + 1.4249322787e-1f;
    z = z * f - 1.6668057665e-1f;
    z = z * f + 2.0000714765e-1f;
    z = z * f - 2.4999993993e-1f;
    z = z * f + 3.3333331174e-1f;
    float square = f * f;
    z = z * f * square - (float)k * 2.12194440e-4f - 0.5f * square;
    return (f + (z + lost)) + (float)k * 0.693359375f;
}

INLINE float tanh_(float x) {
    float inside = x > 20.0f ? 20.0f : x;
    inside = inside < -20.0f ? -20.0f : inside;
    float e = expm1_(2.0f * inside);
    return e / (e + 2.0f);
}

INLINE float clamp_log_ratio(float log_ratio) { /* the largest one in divergence/losses.py */
    log_ratio = log_ratio > 80.0f ? 80.0f : log_ratio;
    return log_ratio < -80.0f ? -80.0f : log_ratio;
}

/* Returns the summand and stores the pull, as divergence/losses.py defines them. `kind` is a constant
 * at every call, so that the branches on it disappear. */
INLINE float summand_and_pull(int kind, float a, float p, float q, float log_ratio, float *pull) {
    if (kind == TOTAL_VARIATION) {
        float sign = (log_ratio > 0.0f ? 1.0f : 0.0f) - (log_ratio < 0.0f ? 1.0f : 0.0f);
        *pull = -0.5f * p * sign;
        return 0.5f * fabsf(p - q);
    }
    float teacher_share = kind == SKEW_REVERSE_KL ? 1.0f - a : a;
    log_ratio = clamp_log_ratio(log_ratio);
    float excess = teacher_share * expm1_(log_ratio); /* m / p - 1 */
    float log_m = log1p_(excess);
    if (kind == JSD) {
        *pull = (a - 1.0f) * p * log_m;
        return a * q * (log_ratio - log_m) - (1.0f - a) * p * log_m;
    }
    if (kind == SKEW_FORWARD_KL) {
        *pull = (a - 1.0f) * q / (1.0f + excess);
        return q * (log_ratio - log_m);
    }
    *pull = -p * (log_m - a * excess / (1.0f + excess));
    return -p * log_m;
}
