/* Maximum and log-sum of tiles of 256 logits: the one pass over all classes that a draw makes. */
#include "rows_math.h"
#include "structures.h"

#define TILE 256 /* TILE in sampling/params.py */

/* A tile of -inf has -inf for both; a tile with a NaN, NaN; a tile with +inf, +inf and NaN. */
void tile_logsumexp(const struct tile_logsumexp *x, int64_t first, int64_t last) {
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
