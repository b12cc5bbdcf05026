/* Decode attention on CPU, compiled: the queries of a prompt's rows over the keys that they share,
 * then each row's over its own.
 *
 * Keys go by in blocks that stay in the first-level cache. A block is turned, dimensions in front, so
 * that scores are sums of whole vectors of keys and nothing is ever added across a vector. Softmax is
 * online: sums are relative to the largest score so far. Loaded through ctypes by
 * prefix_attention_native.py, whose structures mirror the ones here.
 */
#include "rows_native_math.h"
#include "turn_native.h"

#define KEYS 64     /* in a block */
#define QUERIES 24  /* that go together: heads of a row, times rows */
#define WIDEST 256  /* dimensions of a head */

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

struct cache { /* keys and values of prompts or of rows, each the first `lengths` of its own */
    const float *key, *value;
    int64_t key_strides[3], value_strides[3]; /* of owner, head and position, in elements */
    const int64_t *lengths;
};

struct attention {
    const float *query;
    float *out;
    int64_t row_stride; /* of queries and out, in elements */
    struct cache prefix, suffix;
    const int64_t *rows; /* [prompts, width], -1 for none; NULL: row = prompt * width + place */
    int64_t width, kv_heads, repeats, dim;
    float scale, softcap; /* softcap 0: none */
    int64_t window;       /* 0: none */
};

struct state { /* of each query: its scaled self and its softmax so far */
    float top[QUERIES], sum[QUERIES];
    float query[QUERIES][WIDEST], mean[QUERIES][WIDEST]; /* mean: not yet divided by the sum */
    float turned[WIDEST][KEYS], score[QUERIES][KEYS];    /* of the block at hand */
};

/* out[r, c] = shrink[r] * out[r, c] + sum_k a[r, k] * b[k, c], of a few vectors of columns. Without
 * `shrink` nothing is there yet, and columns are a whole number of vectors. */
INLINE void tile(
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
            for (int v = 0; v < vectors; v++)
                sum[r][v] += a[r * a_stride + k] * *(const vector *)(b + k * b_stride + v * LANES);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            *(vector *)(out + r * out_stride + v * LANES) = sum[r][v];
}

INLINE void few_rows(
    int rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
    int64_t columns, float *out, int64_t out_stride, const float *shrink
) {
    int64_t c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES)
        tile(rows, 2, a, a_stride, b + c, b_stride, depth, out + c, out_stride, shrink);
    for (; c + LANES <= columns; c += LANES)
        tile(rows, 1, a, a_stride, b + c, b_stride, depth, out + c, out_stride, shrink);
    for (; c < columns; c++)
        for (int r = 0; r < rows; r++) {
            float sum = out[r * out_stride + c] * shrink[r];
            for (int64_t k = 0; k < depth; k++) sum += a[r * a_stride + k] * b[k * b_stride + c];
            out[r * out_stride + c] = sum;
        }
}

INLINE void product(
    int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t depth,
    int64_t columns, float *out, int64_t out_stride, const float *shrink
) {
    for (; rows >= 4; rows -= 4, a += 4 * a_stride, out += 4 * out_stride, shrink += shrink ? 4 : 0)
        few_rows(4, a, a_stride, b, b_stride, depth, columns, out, out_stride, shrink);
    if (rows == 3) few_rows(3, a, a_stride, b, b_stride, depth, columns, out, out_stride, shrink);
    if (rows == 2) few_rows(2, a, a_stride, b, b_stride, depth, columns, out, out_stride, shrink);
    if (rows == 1) few_rows(1, a, a_stride, b, b_stride, depth, columns, out, out_stride, shrink);
}

INLINE int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* turned[d, i] = key[i, d], and 0 in what the last vector has beyond. */
static void turn_keys(const float *key, int64_t stride, int64_t n, int64_t dim, float turned[][KEYS]) {
    float last[TILE][WIDEST];
    int64_t whole = dim - dim % TILE;
    for (int64_t i = 0; i < whole_vectors(n); i += TILE, key += TILE * stride) {
        const float *rows = key;
        int64_t row = stride;
        if (n - i < TILE) { /* what lies beyond may not be ours to read */
            for (int64_t k = 0; k < TILE; k++)
                for (int64_t d = 0; d < dim; d++) last[k][d] = k < n - i ? key[k * stride + d] : 0.0f;
            rows = last[0], row = WIDEST;
        }
        for (int64_t d = 0; d < whole; d += TILE) turn_tile(0, rows + d, row, &turned[d][i], KEYS);
        for (int64_t d = whole; d < dim; d++)
            for (int64_t k = 0; k < TILE; k++) turned[d][i + k] = rows[k * row + d];
    }
}

/* Scores -> exp(score - top), their sum added; returns by how much earlier sums shrink. */
INLINE float weigh(float *score, int64_t first, int64_t n, float softcap, float *top, float *sum) {
    if (softcap != 0.0f) {
        float inverse = 1.0f / softcap;
        SIMD for (int64_t i = 0; i < n; i++) score[i] = softcap * tanh_(score[i] * inverse);
    }
    for (int64_t i = 0; i < first; i++) score[i] = -INFINITY;
    float highest = *top, before = *top, total = 0;
    _Pragma("omp simd reduction(max : highest)") for (int64_t i = 0; i < n; i++) highest =
        score[i] > highest ? score[i] : highest;
    /* Nothing but -inf so far: no mass, rather than exp(-inf - -inf). */
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

/* Asks for what will be read next: rows this short end before the processor has seen a pattern. */
static void prefetch(const float *rows, int64_t stride, int64_t n, int64_t dim) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(rows + i * stride + d, 0, 2);
}

INLINE const float *at(
    const float *start, const int64_t strides[3], int64_t owner, int64_t head, int64_t position
) {
    return start + owner * strides[0] + head * strides[1] + position * strides[2];
}

/* Queries `from` to `from + count` over the keys of an owner. Query q sees those from first[q] on,
 * which may be below 0. */
static void walk(
    struct state *of, const struct attention *x, const struct cache *cache, int64_t owner,
    int64_t head, int64_t from, int64_t count, const int64_t *first
) {
    int64_t length = cache->lengths[owner], start = length;
    for (int64_t q = from; q < from + count; q++) start = first[q] < start ? first[q] : start;
    /* Blocks are the same whichever queries go together, so that a row's sums are. */
    for (start = start > 0 ? start - start % KEYS : 0; start < length; start += KEYS) {
        int64_t n = length - start < KEYS ? length - start : KEYS;
        const float *key = at(cache->key, cache->key_strides, owner, head, start);
        const float *value = at(cache->value, cache->value_strides, owner, head, start);
        float shrink[QUERIES];
        prefetch(value, cache->value_strides[2], n, x->dim);
        turn_keys(key, cache->key_strides[2], n, x->dim, of->turned);
        product(
            count, of->query[from], WIDEST, of->turned[0], KEYS, x->dim, whole_vectors(n),
            of->score[from], KEYS, NULL
        );
        for (int64_t q = from; q < from + count; q++) {
            int64_t hidden = first[q] - start < n ? first[q] - start : n;
            shrink[q] = weigh(of->score[q], hidden, n, x->softcap, &of->top[q], &of->sum[q]);
        }
        product(
            count, of->score[from], KEYS, value, cache->value_strides[2], n, x->dim, of->mean[from],
            WIDEST, shrink + from
        );
    }
}

/* Query heads `heads` of a key head, of the rows at `rows`, all of one prompt. */
static void attend_rows(
    struct state *of, const struct attention *x, int64_t prompt, int64_t head, const int64_t *rows,
    int64_t count, int64_t from, int64_t heads
) {
    int64_t first[QUERIES], before = x->prefix.lengths[prompt], queries = count * heads;
    for (int64_t q = 0; q < queries; q++) {
        int64_t row = rows[q / heads], column = (head * x->repeats + from + q % heads) * x->dim;
        const float *query = x->query + row * x->row_stride + column;
        for (int64_t d = 0; d < x->dim; d++) of->query[q][d] = query[d] * x->scale;
        memset(of->mean[q], 0, x->dim * sizeof(float));
        of->top[q] = -INFINITY;
        of->sum[q] = 0;
        first[q] = x->window ? before + x->suffix.lengths[row] - x->window : 0;
    }
    walk(of, x, &x->prefix, prompt, head, 0, queries, first);
    for (int64_t q = 0; q < queries; q++) first[q] -= before;
    for (int64_t i = 0; i < count; i++) {
        if (i + 1 < count) {
            int64_t own = x->suffix.lengths[rows[i + 1]];
            const int64_t *strides = x->suffix.key_strides;
            const float *next = at(x->suffix.key, strides, rows[i + 1], head, 0);
            prefetch(next, strides[2], own < KEYS ? own : KEYS, x->dim);
        }
        walk(of, x, &x->suffix, rows[i], head, i * heads, heads, first);
    }
    for (int64_t q = 0; q < queries; q++) {
        int64_t column = (head * x->repeats + from + q % heads) * x->dim;
        float *out = x->out + rows[q / heads] * x->row_stride + column;
        float inverse = of->sum[q] == 0.0f ? 0.0f : 1.0f / of->sum[q];
        for (int64_t d = 0; d < x->dim; d++) out[d] = of->mean[q][d] * inverse;
    }
}

/* Units are (prompt, key head, row of the group), the last running fastest. */
void attend(const struct attention *x, int64_t unit, int64_t last) {
    struct state of;
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
            attend_rows(&of, x, prompt, head, rows, count, from, some);
        }
    }
}
