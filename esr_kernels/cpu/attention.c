/* Decode attention on CPU: the queries of a prompt's rows over the prompt's keys, then each row's
 * queries over the row's own keys.
 *
 * Keys are read in blocks that stay in the first-level cache. A block is transposed, dimensions in
 * front, so that scores are sums of whole vectors of keys and no sum runs across the lanes of a vector.
 * The softmax is online: sums are relative to the largest score so far.
 */
#include "rows_math.h"
#include "structures.h"
#include "transpose.h"

#define KEYS 64          /* in a block */
#define QUERIES 24       /* that share a block at most: query heads times rows */
#define MAX_HEAD_DIM 256 /* _MAX_HEAD_DIM in attention.py */

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* a * b + c, rounded once where the processor can. Left to choose, GCC fuses the two or not by how many
 * sums a loop has, on processors for which it avoids chains of fused ones (`avoid-fma-max-bits`): a row
 * would have other digits next to other rows. */
#if defined(__AVX512F__)
#define FUSED(a, b, c) ((vector)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)(b), (__m512)(c)))
#elif defined(__FMA__)
#define FUSED(a, b, c) ((vector)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)(b), (__m256)(c)))
#else
#define FUSED(a, b, c) ((c) + (a) * (b))
#endif
#ifdef __FMA__
#define FUSED_SCALAR(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FUSED_SCALAR(a, b, c) ((c) + (a) * (b))
#endif

struct state { /* of up to QUERIES queries */
    float top[QUERIES], sum[QUERIES];   /* largest score so far, and sum of exp(score - top) */
    float query[QUERIES][MAX_HEAD_DIM]; /* scaled */
    float mean[QUERIES][MAX_HEAD_DIM];  /* of values, before the division by `sum` */
    float transposed[MAX_HEAD_DIM][KEYS], score[QUERIES][KEYS]; /* of the current block */
};

/* out[r, c] = shrink[r] * out[r, c] + sum_k a[r, k] * b[k, c], for a few vectors of columns. If
 * `shrink` is NULL, `out` is overwritten, and the columns must be a whole number of vectors. */
INLINE void product_tile(
    int rows, int vectors, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
    int64_t depth, float *out, int64_t out_stride, const float *shrink
) {
    vector sum[4][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            if (shrink)
                sum[r][v] = *(const vector *)(out + r * out_stride + v * LANES) * shrink[r];
            else
                sum[r][v] = (vector){0};
    for (int64_t k = 0; k < depth; k++)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) {
                vector column = *(const vector *)(b + k * b_stride + v * LANES);
                sum[r][v] = FUSED(a[r * a_stride + k], column, sum[r][v]);
            }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            *(vector *)(out + r * out_stride + v * LANES) = sum[r][v];
}

INLINE void product_rows(
    int rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
    int64_t columns, float *out, int64_t out_stride, const float *shrink
) {
    int64_t c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES)
        product_tile(rows, 2, a, a_stride, b + c, b_stride, depth, out + c, out_stride, shrink);
    for (; c + LANES <= columns; c += LANES)
        product_tile(rows, 1, a, a_stride, b + c, b_stride, depth, out + c, out_stride, shrink);
    for (; c < columns; c++)
        for (int r = 0; r < rows; r++) {
            float sum = out[r * out_stride + c] * shrink[r];
            for (int64_t k = 0; k < depth; k++)
                sum = FUSED_SCALAR(a[r * a_stride + k], b[k * b_stride + c], sum);
            out[r * out_stride + c] = sum;
        }
}

INLINE void product(
    int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
    int64_t columns, float *out, int64_t out_stride, const float *shrink
) {
    for (; rows >= 4; rows -= 4, a += 4 * a_stride, out += 4 * out_stride, shrink += shrink ? 4 : 0)
        product_rows(4, a, a_stride, b, b_stride, depth, columns, out, out_stride, shrink);
    if (rows == 3) product_rows(3, a, a_stride, b, b_stride, depth, columns, out, out_stride, shrink);
    if (rows == 2) product_rows(2, a, a_stride, b, b_stride, depth, columns, out, out_stride, shrink);
    if (rows == 1) product_rows(1, a, a_stride, b, b_stride, depth, columns, out, out_stride, shrink);
}

INLINE int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* transposed[d, i] = key[i, d], and 0 in the lanes of the last vector past key n. */
static void transpose_keys(
    const float *key, int64_t stride, int64_t n, int64_t dim, float transposed[][KEYS]
) {
    float last[SQUARE][MAX_HEAD_DIM];
    int64_t whole = dim - dim % SQUARE;
    for (int64_t i = 0; i < whole_vectors(n); i += SQUARE, key += SQUARE * stride) {
        const float *rows = key;
        int64_t row = stride;
        if (n - i < SQUARE) { /* keys past n may lie outside of the tensor */
            for (int64_t k = 0; k < SQUARE; k++)
                for (int64_t d = 0; d < dim; d++) last[k][d] = k < n - i ? key[k * stride + d] : 0.0f;
            rows = last[0], row = MAX_HEAD_DIM;
        }
        for (int64_t d = 0; d < whole; d += SQUARE)
            transpose_square(0, rows + d, row, &transposed[d][i], KEYS);
        for (int64_t d = whole; d < dim; d++)
            for (int64_t k = 0; k < SQUARE; k++) transposed[d][i + k] = rows[k * row + d];
    }
}

/* Replaces scores by exp(score - top) and adds them to `sum`; returns the factor of earlier sums. Keys
 * before `first` are hidden by the window. */
INLINE float softmax_block(
    float *score, int64_t first, int64_t n, float softcap, float *top, float *sum
) {
    if (softcap != 0.0f) {
        float inverse = 1.0f / softcap;
        SIMD for (int64_t i = 0; i < n; i++) score[i] = softcap * tanh_(score[i] * inverse);
    }
    for (int64_t i = 0; i < first; i++) score[i] = -INFINITY;
    float highest = *top, before = *top, total = 0;
    _Pragma("omp simd reduction(max : highest)") for (int64_t i = 0; i < n; i++) highest =
        score[i] > highest ? score[i] : highest;
    /* All scores so far are -inf: avoids exp(-inf - -inf), which is NaN. */
    float base = highest == -INFINITY ? 0.0f : highest;
    _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; i++) {
        score[i] = exp_(score[i] - base);
        total += score[i];
    }
    float shrink = exp_(before - base);
    *top = highest;
    *sum = *sum * shrink + total;
    return shrink;
}

/* Prefetches rows: they are too short for the hardware prefetcher to detect a pattern. */
static void prefetch(const float *rows, int64_t stride, int64_t n, int64_t dim) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(rows + i * stride + d, 0, 2);
}

INLINE const float *at(
    const float *start, const int64_t strides[3], int64_t owner, int64_t head, int64_t position
) {
    return start + owner * strides[0] + head * strides[1] + position * strides[2];
}

/* Queries `from` to `from + count` over the keys of an owner. Query q sees keys from position first[q]
 * on, which may be negative. */
static void attend_keys(
    struct state *state, const struct attention *x, const struct cache *cache, int64_t owner,
    int64_t head, int64_t from, int64_t count, const int64_t *first
) {
    int64_t length = cache->lengths[owner], start = length;
    for (int64_t q = from; q < from + count; q++) start = first[q] < start ? first[q] : start;
    /* Blocks start at multiples of KEYS whichever queries share them, so that a row's result does not
     * depend on the other rows. */
    for (start = start > 0 ? start - start % KEYS : 0; start < length; start += KEYS) {
        int64_t n = length - start < KEYS ? length - start : KEYS;
        const float *key = at(cache->key, cache->key_strides, owner, head, start);
        const float *value = at(cache->value, cache->value_strides, owner, head, start);
        float shrink[QUERIES];
        prefetch(value, cache->value_strides[2], n, x->dim);
        transpose_keys(key, cache->key_strides[2], n, x->dim, state->transposed);
        product(
            count, state->query[from], MAX_HEAD_DIM, state->transposed[0], KEYS, x->dim,
            whole_vectors(n), state->score[from], KEYS, NULL
        );
        for (int64_t q = from; q < from + count; q++) {
            int64_t hidden = first[q] - start < n ? first[q] - start : n;
            float *top = &state->top[q], *sum = &state->sum[q];
            shrink[q] = softmax_block(state->score[q], hidden, n, x->softcap, top, sum);
        }
        product(
            count, state->score[from], KEYS, value, cache->value_strides[2], n, x->dim,
            state->mean[from], MAX_HEAD_DIM, shrink + from
        );
    }
}

/* `heads` query heads of a key head, starting at `from`, for `count` rows of one prompt. */
static void attend_rows(
    struct state *state, const struct attention *x, int64_t prompt, int64_t head,
    const int64_t *rows, int64_t count, int64_t from, int64_t heads
) {
    int64_t first[QUERIES], before = x->prefix.lengths[prompt], queries = count * heads;
    for (int64_t q = 0; q < queries; q++) {
        int64_t row = rows[q / heads], column = (head * x->repeats + from + q % heads) * x->dim;
        const float *query = x->query + row * x->row_stride + column;
        for (int64_t d = 0; d < x->dim; d++) state->query[q][d] = query[d] * x->scale;
        memset(state->mean[q], 0, x->dim * sizeof(float));
        state->top[q] = -INFINITY;
        state->sum[q] = 0;
        first[q] = x->window ? before + x->suffix.lengths[row] - x->window : 0;
    }
    attend_keys(state, x, &x->prefix, prompt, head, 0, queries, first);
    for (int64_t q = 0; q < queries; q++) first[q] -= before;
    for (int64_t i = 0; i < count; i++) {
        if (i + 1 < count) {
            int64_t own = x->suffix.lengths[rows[i + 1]];
            const int64_t *strides = x->suffix.key_strides;
            const float *next = at(x->suffix.key, strides, rows[i + 1], head, 0);
            prefetch(next, strides[2], own < KEYS ? own : KEYS, x->dim);
        }
        attend_keys(state, x, &x->suffix, rows[i], head, i * heads, heads, first);
    }
    for (int64_t q = 0; q < queries; q++) {
        int64_t column = (head * x->repeats + from + q % heads) * x->dim;
        float *out = x->out + rows[q / heads] * x->row_stride + column;
        float inverse = state->sum[q] == 0.0f ? 0.0f : 1.0f / state->sum[q];
        for (int64_t d = 0; d < x->dim; d++) out[d] = state->mean[q][d] * inverse;
    }
}

/* A unit is (prompt, key head, place in the prompt's group), the last running fastest. */
void attend(const struct attention *x, int64_t unit, int64_t last) {
    struct state state;
    int64_t heads = x->repeats < QUERIES ? x->repeats : QUERIES, rows[QUERIES];
    while (unit < last) {
        int64_t head = unit / x->width % x->kv_heads, prompt = unit / x->width / x->kv_heads;
        int64_t count = 0;
        do {
            int64_t row = prompt * x->width + unit % x->width;
            if (x->rows) row = x->rows[row];
            if (row >= 0) rows[count++] = row;
            unit++;
        } while (unit < last && unit % x->width && (count + 1) * heads <= QUERIES);
        if (count == 0) continue;
        for (int64_t from = 0; from < x->repeats; from += heads) {
            int64_t some = x->repeats - from < heads ? x->repeats - from : heads;
            attend_rows(&state, x, prompt, head, rows, count, from, some);
        }
    }
}
