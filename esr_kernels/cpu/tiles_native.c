/* Maximum and log-sum of tiles of logits, compiled: the one pass that a draw makes over all classes. */
#include "rows_native_math.h"

#define TILE 256 /* sampling_law.py */

struct tiles {
    const float *logits;       /* [n, TILE] */
    float *maxima, *log_sums;  /* [n]; log of the sum of exp(logit - maximum) */
};

/* A tile of -inf has -inf for both; one with a NaN, NaN; one with +inf, +inf and NaN. */
void tile_sums(const struct tiles *x, int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; tile++) {
        const float *z = x->logits + tile * TILE;
        float top = -INFINITY, sum = 0;
        _Pragma("omp simd reduction(max : top)") for (int64_t i = 0; i < TILE; i++) top =
            z[i] > top ? z[i] : top;
        float base = top == -INFINITY ? 0.0f : top;
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < TILE; i++) sum +=
            exp_(z[i] - base);
        x->maxima[tile] = isnan(sum) && top != INFINITY ? NAN : top;
        x->log_sums[tile] = logf(sum);
    }
}
