/* A square of fp32 turned in registers: of logits in turn_native.c, of keys in attention_native.c. */
#pragma once
#include <stdint.h>
#include <string.h>

#define TILE 8 /* rows and columns */

#ifdef __AVX__
#include <immintrin.h>

/* out[k, i] = in[i, k]. `past_caches` stores need `out` and its rows at multiples of 32 bytes, and a
 * fence at the end. Pairs, then pairs of pairs, then halves of the registers change places. */
static inline __attribute__((always_inline)) void turn_tile(
    int past_caches, const float *in, int64_t in_stride, float *out, int64_t out_stride
) {
    __m256 a[TILE], b[TILE];
    for (int i = 0; i < TILE; i++) a[i] = _mm256_loadu_ps(in + i * in_stride);
    for (int i = 0; i < TILE; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < TILE; i += 4)
        for (int k = 0; k < 2; k++) {
            a[i + 2 * k] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0x44);
            a[i + 2 * k + 1] = _mm256_shuffle_ps(b[i + k], b[i + k + 2], 0xee);
        }
    for (int k = 0; k < TILE; k++) {
        float *row = out + k * out_stride;
        __m256 whole = k < 4 ? _mm256_permute2f128_ps(a[k], a[k + 4], 0x20)
                             : _mm256_permute2f128_ps(a[k - 4], a[k], 0x31);
        if (past_caches) _mm256_stream_ps(row, whole);
        else _mm256_storeu_ps(row, whole);
    }
}
#else
static inline void turn_tile(
    int past_caches, const float *in, int64_t in_stride, float *out, int64_t out_stride
) {
    (void)past_caches;
    float tile[TILE][TILE];
    for (int i = 0; i < TILE; i++)
        for (int k = 0; k < TILE; k++) tile[k][i] = in[i * in_stride + k];
    for (int k = 0; k < TILE; k++) memcpy(out + k * out_stride, tile[k], sizeof tile[k]);
}
#endif
