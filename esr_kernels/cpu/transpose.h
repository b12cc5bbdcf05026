/* Transposes a square of 8 x 8 fp32 in registers: logits in transpose.c, keys in attention.c. */
#pragma once
#include <stdint.h>
#include <string.h>

#define SQUARE 8 /* rows and columns */

#ifdef __AVX__
#include <immintrin.h>

/* out[k, i] = in[i, k]: exchanges pairs, then pairs of pairs, then halves of the registers. With
 * `bypass_caches`, rows of `out` must be aligned to 32 bytes, and the caller issues a store fence. */
static inline __attribute__((always_inline)) void transpose_square(
    int bypass_caches, const float *in, int64_t in_stride, float *out, int64_t out_stride
) {
    __m256 a[SQUARE], b[SQUARE];
    for (int i = 0; i < SQUARE; i++) a[i] = _mm256_loadu_ps(in + i * in_stride);
    for (int i = 0; i < SQUARE; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < SQUARE; i += 4)
        for (int k = 0; k < 2; k++) {
            a[i + 2 * k] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0x44);
            a[i + 2 * k + 1] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0xee);
        }
    for (int k = 0; k < SQUARE; k++) {
        float *row = out + k * out_stride;
        __m256 whole = k < 4 ? _mm256_permute2f128_ps(a[k], a[k + 4], 0x20)
                             : _mm256_permute2f128_ps(a[k - 4], a[k], 0x31);
        if (bypass_caches) _mm256_stream_ps(row, whole);
        else _mm256_storeu_ps(row, whole);
    }
}
#else
static inline void transpose_square(
    int bypass_caches, const float *in, int64_t in_stride, float *out, int64_t out_stride
) {
    (void)bypass_caches;
    float square[SQUARE][SQUARE];
    for (int i = 0; i < SQUARE; i++)
        for (int k = 0; k < SQUARE; k++) square[k][i] = in[i * in_stride + k];
    for (int k = 0; k < SQUARE; k++) memcpy(out + k * out_stride, square[k], sizeof square[k]);
}
#endif
