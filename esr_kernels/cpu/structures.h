/* Structures and numbers that Python and C share: structures.py mirrors the structures, and their
 * sizes, which structures.c exports, are compared with Python's when the library is loaded.
 */
#pragma once
#include <stdint.h>

/* Kinds of divergence, numbered as KernelKind in divergence/losses.py. KL_MIX is
 * a KL(q||p) + b KL(p||q), with p the student and q the teacher. */
enum kind { KL_MIX, JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TOTAL_VARIATION };

struct transform { /* softcap * tanh(scale * (z + bias) / softcap) / temperature */
    const float *bias; /* [classes] or NULL */
    float slope;       /* scale / temperature, used without a softcap */
    float inner;       /* scale / softcap, 0 without a softcap */
    float outer;       /* softcap / temperature, 0 without a softcap */
};

struct row_normalizers { /* of whole rows, [n] each */
    const float *student_lse, *teacher_lse, *lse_difference, *pull_sum;
    const float *student_residual, *teacher_residual; /* what rounding left out of the log-sum-exps */
};

struct row_pass { /* one pass over n rows of a tile of classes */
    float *student, *teacher; /* raw logits; overwritten */
    int64_t student_stride, teacher_stride, classes; /* strides: elements between rows */
    struct transform student_transform, teacher_transform;
    int32_t kind;
    float a, b; /* KL_MIX: weights of KL(q||p) and KL(p||q); other kinds: a is the parameter */
    const float *row_weight; /* [n], or NULL for 1 */
    const int64_t *labels;   /* [n] counted from the tile's first class, or NULL */
    float label_weight;      /* of the cross-entropy */
    int64_t ignored_label;   /* of a row without a label */
    struct row_normalizers normalizers; /* this and the outputs: NULL where the pass has no use */
    float *parts, *sums;                /* outputs [n, COLUMNS] and [n, 3] */
};

struct cache { /* keys and values of owners: prompts, or rows */
    const float *key, *value;
    int64_t key_strides[3], value_strides[3]; /* of owner, head and position, in elements */
    const int64_t *lengths;                   /* of each owner's keys, in positions */
};

struct attention {
    const float *query;
    float *out;
    int64_t row_stride; /* of query and out, in elements */
    struct cache prefix, suffix;
    const int64_t *rows; /* [prompts, width], -1 for an empty place; NULL: prompt * width + place */
    int64_t width, kv_heads, repeats, dim; /* repeats: query heads of a key head */
    float scale, softcap;                  /* softcap 0: none */
    int64_t window;                        /* 0: none */
};

struct tile_logsumexp {
    const float *logits;      /* [n, 256] */
    float *maxima, *log_sums; /* [n]; log of the sum of exp(logit - maximum) */
};
