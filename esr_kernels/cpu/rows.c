/* Row passes on CPU: the arithmetic of rows_torch.py with few trips through memory. A pass reads a row
 * in blocks that stay in the first-level cache: once for the statistics, computed online, once for the
 * gradient, and once more for divergences other than mixes of the two KLs.
 *
 * Every loop is written so that the compiler vectorizes it: no branches, no calls. Sums are fp32 within
 * a block and double across blocks.
 */
#include "rows_math.h"
#include "structures.h"

#define BLOCK 256

/* Columns of a part's statistics, in pairs (student, teacher): divergence/statistics.py. */
enum { MAX = 0, LOG_SUM = 2, DIFFERENCE = 4, CENTRED = 6, ARGMAX = 8, COLUMNS = 10 };

INLINE void transform_block(float *z, int64_t start, int64_t n, const struct transform *how) {
    if (how->bias) {
        const float *bias = how->bias + start;
        SIMD for (int64_t i = 0; i < n; i++) z[i] += bias[i];
    }
    if (how->inner != 0.0f) {
        float inner = how->inner, outer = how->outer;
        /* A class that a bias of -inf removed stays removed: its tanh of -1 is a finite logit. */
        SIMD for (int64_t i = 0; i < n; i++) {
            float x = z[i] * inner, y = tanh_(x) * outer;
            z[i] = x == -INFINITY ? x : y;
        }
    } else if (how->slope != 1.0f) {
        float slope = how->slope;
        SIMD for (int64_t i = 0; i < n; i++) z[i] *= slope;
    }
}

/* d(transformed)/d(raw) divided by scale / temperature, from a transformed logit. `capped` is a
 * constant at every call. */
INLINE float chain(int capped, float z, float inverse_outer) {
    float x = z * inverse_outer;
    float square = x * x;
    square = square > 1.0f ? 1.0f : square; /* a removed class's logit is -inf */
    return capped ? 1.0f - square : 1.0f;
}

INLINE float inverse_outer_of(const struct transform *how) {
    return how->inner != 0.0f ? 1.0f / how->outer : 0.0f;
}

INLINE float block_max(const float *z, int64_t n) {
    float top = -INFINITY;
    _Pragma("omp simd reduction(max : top)") for (int64_t i = 0; i < n; i++) top =
        z[i] > top ? z[i] : top;
    return top;
}

/* Online statistics of one model's row: sums relative to the running maximum. */
struct running {
    float top;
    int64_t top_block; /* first class of the block that has the maximum first */
    double sum, difference, centred;
};

INLINE void raise_top(struct running *r, float top, int64_t start) {
    if (!(top > r->top)) return;
    if (r->sum != 0.0) {
        double by = (double)r->top - (double)top, factor = exp(by);
        r->centred = factor * (r->centred + r->sum * by);
        r->difference *= factor;
        r->sum *= factor;
    }
    r->top = top;
    r->top_block = start;
}

/* Sums of p, p * (t - s), p * (s - top), q, q * (t - s), q * (t - top), unnormalized. With
 * `guard_infinite`, a class of probability 0 adds 0 even if its logit is infinite, where the product
 * would be 0 * inf; NaN still propagates. */
INLINE void block_sums(
    int guard_infinite, const float *s, const float *t, int64_t n, float s_top, float t_top,
    float sums[6]
) {
    float s_sum = 0, s_difference = 0, s_centred = 0, t_sum = 0, t_difference = 0, t_centred = 0;
    _Pragma("omp simd reduction(+ : s_sum, s_difference, s_centred, t_sum, t_difference, t_centred)")
    for (int64_t i = 0; i < n; i++) {
        float ds = s[i] - s_top, dt = t[i] - t_top, difference = t[i] - s[i];
        float p = exp_(ds), q = exp_(dt);
        s_sum += p;
        t_sum += q;
        s_difference += guard_infinite && p == 0.0f ? 0.0f : p * difference;
        t_difference += guard_infinite && q == 0.0f ? 0.0f : q * difference;
        s_centred += guard_infinite && p == 0.0f ? 0.0f : p * ds;
        t_centred += guard_infinite && q == 0.0f ? 0.0f : q * dt;
    }
    sums[0] = s_sum, sums[1] = s_difference, sums[2] = s_centred;
    sums[3] = t_sum, sums[4] = t_difference, sums[5] = t_centred;
}

INLINE void row_statistics(
    float *s, float *t, const struct row_pass *x, struct running *student, struct running *teacher
) {
    struct running one = {-INFINITY, 0, 0, 0, 0}, two = one;
    for (int64_t start = 0; start < x->classes; start += BLOCK) {
        int64_t n = x->classes - start < BLOCK ? x->classes - start : BLOCK;
        float *bs = s + start, *bt = t + start;
        transform_block(bs, start, n, &x->student_transform);
        transform_block(bt, start, n, &x->teacher_transform);
        raise_top(&one, block_max(bs, n), start);
        raise_top(&two, block_max(bt, n), start);
        float sums[6];
        block_sums(0, bs, bt, n, one.top, two.top, sums);
        float check = sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5];
        if (!(check - check == 0.0f)) block_sums(1, bs, bt, n, one.top, two.top, sums);
        /* All logits so far are -inf: adds nothing, as exp(-inf - -inf) is NaN. */
        if (one.top != -INFINITY || isnan(bs[0]))
            one.sum += sums[0], one.difference += sums[1], one.centred += sums[2];
        if (two.top != -INFINITY || isnan(bt[0]))
            two.sum += sums[3], two.difference += sums[4], two.centred += sums[5];
    }
    *student = one;
    *teacher = two;
}

INLINE void write_part(float *part, int model, const float *z, int64_t n, const struct running *r) {
    int64_t at = r->top_block;
    while (at < n && !(z[at] == r->top)) at++;
    part[MAX + model] = r->top;
    part[ARGMAX + model] = (float)(at < n ? at : 0);
    part[LOG_SUM + model] = (float)log(r->sum);
    part[DIFFERENCE + model] = r->sum == 0.0 ? 0.0f : (float)(r->difference / r->sum);
    part[CENTRED + model] = r->sum == 0.0 ? 0.0f : (float)(r->centred / r->sum);
}

/* p = exp(s - s_top) * s_scale and q likewise; log q - log p = t - s + lse_difference. */
struct normalizer {
    float s_top, s_scale, t_top, t_scale, lse_difference;
};

INLINE float log_ratio_of(float s, float t, float p, float q, float lse_difference) {
    return p == 0.0f && q == 0.0f ? 0.0f : (t - s) + lse_difference;
}

/* s <- weight * chain * (pull - p * pull_sum), for a mix of the two KLs. */
INLINE void mix_gradient(
    int capped, float *s, const float *t, int64_t n, const struct row_pass *x,
    struct normalizer norm, float pull_sum, float weight
) {
    float forward = x->a, reverse = x->b;
    float inverse_outer = inverse_outer_of(&x->student_transform);
    if (forward == 0.0f) {
        SIMD for (int64_t i = 0; i < n; i++) {
            float p = exp_(s[i] - norm.s_top) * norm.s_scale;
            float dz = p * (-reverse * (t[i] - s[i]) - pull_sum);
            s[i] = (p != 0.0f ? dz : 0.0f) * (weight * chain(capped, s[i], inverse_outer));
        }
        return;
    }
    SIMD for (int64_t i = 0; i < n; i++) {
        float p = exp_(s[i] - norm.s_top) * norm.s_scale;
        float q = exp_(t[i] - norm.t_top) * norm.t_scale;
        float dz = p * (-reverse * (t[i] - s[i]) - pull_sum);
        s[i] = ((p != 0.0f ? dz : 0.0f) - forward * q) * (weight * chain(capped, s[i], inverse_outer));
    }
}

/* mix_gradient for KL(q||p) alone, without t - s, which may be infinite. */
INLINE void forward_gradient(
    int capped, float *s, const float *t, int64_t n, const struct row_pass *x,
    struct normalizer norm, float pull_sum, float weight
) {
    float forward = x->a;
    float inverse_outer = inverse_outer_of(&x->student_transform);
    SIMD for (int64_t i = 0; i < n; i++) {
        float p = exp_(s[i] - norm.s_top) * norm.s_scale;
        float q = exp_(t[i] - norm.t_top) * norm.t_scale;
        s[i] = (-p * pull_sum - forward * q) * (weight * chain(capped, s[i], inverse_outer));
    }
}

#define FOR_KIND(kind, call)                                                                       \
    switch (kind) {                                                                                \
    case JSD: call(JSD); break;                                                                    \
    case SKEW_FORWARD_KL: call(SKEW_FORWARD_KL); break;                                            \
    case SKEW_REVERSE_KL: call(SKEW_REVERSE_KL); break;                                            \
    case TOTAL_VARIATION: call(TOTAL_VARIATION); break;                                            \
    }

/* Sums of summands, pulls and p over a row of transformed logits. With `keep`, replaces s by p and t
 * by the pulls, both multiplied by `chain`. */
INLINE void pull_sums_of(
    int kind, int keep, int capped, float *s, float *t, const struct row_pass *x,
    struct normalizer norm, double sums[3]
) {
    float a = x->a, inverse_outer = inverse_outer_of(&x->student_transform);
    sums[0] = sums[1] = sums[2] = 0;
    for (int64_t start = 0; start < x->classes; start += BLOCK) {
        int64_t n = x->classes - start < BLOCK ? x->classes - start : BLOCK;
        float *bs = s + start, *bt = t + start, value = 0, pulls = 0, mass = 0;
        _Pragma("omp simd reduction(+ : value, pulls, mass)") for (int64_t i = 0; i < n; i++) {
            float p = exp_(bs[i] - norm.s_top) * norm.s_scale;
            float q = exp_(bt[i] - norm.t_top) * norm.t_scale;
            float pull, log_ratio = log_ratio_of(bs[i], bt[i], p, q, norm.lse_difference);
            value += summand_and_pull(kind, a, p, q, log_ratio, &pull);
            pulls += pull;
            mass += p;
            if (keep) {
                float slope = chain(capped, bs[i], inverse_outer);
                bt[i] = pull * slope;
                bs[i] = p * slope;
            }
        }
        sums[0] += value, sums[1] += pulls, sums[2] += mass;
    }
}

static void pull_sums_keep(
    float *s, float *t, const struct row_pass *x, struct normalizer norm, double total[3]
) {
#define CAPPED(kind) pull_sums_of(kind, 1, 1, s, t, x, norm, total)
#define UNCAPPED(kind) pull_sums_of(kind, 1, 0, s, t, x, norm, total)
    if (x->student_transform.inner != 0.0f) {
        FOR_KIND(x->kind, CAPPED)
    } else {
        FOR_KIND(x->kind, UNCAPPED)
    }
#undef CAPPED
#undef UNCAPPED
}

INLINE void two_pass_gradient(
    int kind, int capped, float *s, const float *t, int64_t n, const struct row_pass *x,
    struct normalizer norm, float pull_sum, float weight
) {
    float a = x->a, inverse_outer = inverse_outer_of(&x->student_transform);
    SIMD for (int64_t i = 0; i < n; i++) {
        float p = exp_(s[i] - norm.s_top) * norm.s_scale;
        float q = exp_(t[i] - norm.t_top) * norm.t_scale;
        float pull, log_ratio = log_ratio_of(s[i], t[i], p, q, norm.lse_difference);
        summand_and_pull(kind, a, p, q, log_ratio, &pull);
        s[i] = (pull - p * pull_sum) * (weight * chain(capped, s[i], inverse_outer));
    }
}

INLINE int has_label(const struct row_pass *x, int64_t row) {
    return x->labels && x->labels[row] >= 0 && x->labels[row] < x->classes;
}

/* Zeroes the gradient of a row of weight 0, which the logits may have made NaN; returns whether. */
INLINE int zero_if_unweighted(const struct row_pass *x, int64_t row) {
    if (!x->row_weight || x->row_weight[row] != 0.0f) return 0;
    memset(x->student + row * x->student_stride, 0, x->classes * sizeof(float));
    return 1;
}

INLINE float weight_of(const struct row_pass *x, int64_t row) {
    return x->row_weight ? x->row_weight[row] : 1.0f;
}

INLINE float label_chain(const struct row_pass *x, const float *s, int64_t label) {
    const struct transform *how = &x->student_transform;
    return how->inner != 0.0f ? chain(1, s[label], inverse_outer_of(how)) : 1.0f;
}

/* parts [n, COLUMNS] of a tile. */
void tile_stats(const struct row_pass *x, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        float *s = x->student + row * x->student_stride, *t = x->teacher + row * x->teacher_stride;
        struct running student, teacher;
        row_statistics(s, t, x, &student, &teacher);
        write_part(x->parts + row * COLUMNS, 0, s, x->classes, &student);
        write_part(x->parts + row * COLUMNS, 1, t, x->classes, &teacher);
    }
}

static void transform_rows(const struct row_pass *x, float *s, float *t) {
    for (int64_t start = 0; start < x->classes; start += BLOCK) {
        int64_t n = x->classes - start < BLOCK ? x->classes - start : BLOCK;
        transform_block(s + start, start, n, &x->student_transform);
        transform_block(t + start, start, n, &x->teacher_transform);
    }
}

INLINE struct normalizer normalizer_of(const struct row_normalizers *of, int64_t row) {
    struct normalizer norm = {
        of->student_lse[row], expf(-of->student_residual[row]), of->teacher_lse[row],
        expf(-of->teacher_residual[row]), of->lse_difference[row],
    };
    return norm;
}

/* sums [n, 3] of summands, pulls and p over a tile. */
void tile_pull_sums(const struct row_pass *x, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        float *s = x->student + row * x->student_stride, *t = x->teacher + row * x->teacher_stride;
        struct normalizer norm = normalizer_of(&x->normalizers, row);
        double total[3] = {0, 0, 0};
        transform_rows(x, s, t);
#define SUMS(kind) pull_sums_of(kind, 0, 0, s, t, x, norm, total)
        FOR_KIND(x->kind, SUMS)
#undef SUMS
        for (int i = 0; i < 3; i++) x->sums[row * 3 + i] = (float)total[i];
    }
}

INLINE void gradient_of(
    int capped, float *s, const float *t, int64_t n, const struct row_pass *x,
    struct normalizer norm, float pull_sum, float weight
) {
    if (x->kind == KL_MIX && x->b == 0.0f) {
        forward_gradient(capped, s, t, n, x, norm, pull_sum, weight);
    } else if (x->kind == KL_MIX) {
        mix_gradient(capped, s, t, n, x, norm, pull_sum, weight);
    } else {
#define GRADIENT(kind) two_pass_gradient(kind, capped, s, t, n, x, norm, pull_sum, weight)
        FOR_KIND(x->kind, GRADIENT)
#undef GRADIENT
    }
}

static void gradient_block(
    float *s, const float *t, int64_t n, const struct row_pass *x, struct normalizer norm,
    float pull_sum, float weight
) {
    if (x->student_transform.inner != 0.0f)
        gradient_of(1, s, t, n, x, norm, pull_sum, weight);
    else
        gradient_of(0, s, t, n, x, norm, pull_sum, weight);
}

/* s <- dz of a tile, given the normalizers of its rows. */
void tile_gradient(const struct row_pass *x, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        float *s = x->student + row * x->student_stride, *t = x->teacher + row * x->teacher_stride;
        struct normalizer norm = normalizer_of(&x->normalizers, row);
        float weight = weight_of(x, row), at_label = 0;
        if (zero_if_unweighted(x, row)) continue;
        for (int64_t start = 0; start < x->classes; start += BLOCK) {
            int64_t n = x->classes - start < BLOCK ? x->classes - start : BLOCK;
            transform_block(s + start, start, n, &x->student_transform);
            transform_block(t + start, start, n, &x->teacher_transform);
            if (has_label(x, row) && x->labels[row] >= start && x->labels[row] < start + n)
                at_label = label_chain(x, s, x->labels[row]);
            gradient_block(s + start, t + start, n, x, norm, x->normalizers.pull_sum[row], weight);
        }
        if (has_label(x, row)) s[x->labels[row]] -= x->label_weight * weight * at_label;
    }
}

/* Whole rows at once: parts [n, COLUMNS], sums [n, 3] (not for KL_MIX), and s <- dz. */
void stash_rows(const struct row_pass *x, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        float *s = x->student + row * x->student_stride, *t = x->teacher + row * x->teacher_stride;
        float *part = x->parts + row * COLUMNS, weight = weight_of(x, row), at_label = 0;
        struct running student, teacher;
        row_statistics(s, t, x, &student, &teacher);
        write_part(part, 0, s, x->classes, &student);
        write_part(part, 1, t, x->classes, &teacher);
        double lse_difference = (double)student.top - teacher.top + log(student.sum / teacher.sum);
        struct normalizer norm = {
            student.top, (float)(1.0 / student.sum), teacher.top, (float)(1.0 / teacher.sum),
            (float)lse_difference,
        };
        int64_t label = has_label(x, row) ? x->labels[row] : -1;
        if (label >= 0) at_label = label_chain(x, s, label);
        int labelled = x->labels && x->labels[row] != x->ignored_label;
        float label_pull = labelled ? -x->label_weight : 0.0f;
        if (x->kind == KL_MIX) {
            float pull_sum = -x->a - (x->b != 0.0f ? x->b * part[DIFFERENCE] : 0.0f) + label_pull;
            gradient_block(s, t, x->classes, x, norm, pull_sum, weight);
        } else {
            double total[3] = {0, 0, 0};
            pull_sums_keep(s, t, x, norm, total);
            for (int i = 0; i < 3; i++) x->sums[row * 3 + i] = (float)total[i];
            float pull_sum = (float)(total[1] / total[2]) + label_pull;
            int64_t n = x->classes;
            SIMD for (int64_t i = 0; i < n; i++) s[i] = weight * (t[i] - s[i] * pull_sum);
        }
        if (label >= 0) s[label] -= x->label_weight * weight * at_label;
        zero_if_unweighted(x, row);
    }
}
