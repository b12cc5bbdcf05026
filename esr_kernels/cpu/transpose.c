/* Transposes a strip of logits: where a projection is faster with the classes in front (products.py),
 * its result [classes, tokens] becomes rows of tokens again.
 *
 * The output rows are far apart in memory and longer than the caches, so on x86 the stores bypass the
 * caches: an ordinary store would first read every cache line that it overwrites.
 */
#include "transpose.h"

static void transpose_elements(
    const float *strip, int64_t tokens, float *out, int64_t stride, int64_t first_token,
    int64_t last_token, int64_t first_class, int64_t last_class
) {
    for (int64_t token = first_token; token < last_token; token++)
        for (int64_t class = first_class; class < last_class; class++)
            out[token * stride + class] = strip[class * tokens + token];
}

#ifdef __AVX__
static int is_aligned(const float *out, int64_t stride) {
    return (((uintptr_t)out | (uintptr_t)(stride * (int64_t)sizeof(float))) & 31) == 0;
}
#else
static int is_aligned(const float *out, int64_t stride) {
    (void)out, (void)stride;
    return 1;
}
#endif

/* out[token, class] = strip[class, token]; rows of `out` are `stride` elements apart. */
void transpose(const float *strip, int64_t classes, int64_t tokens, float *out, int64_t stride) {
    int64_t whole_tokens = tokens - tokens % SQUARE, whole_classes = classes - classes % SQUARE;
    if (!is_aligned(out, stride)) whole_tokens = 0;
    for (int64_t token = 0; token < whole_tokens; token += SQUARE)
        for (int64_t class = 0; class < whole_classes; class += SQUARE)
            transpose_square(
                1, strip + class * tokens + token, tokens, out + token * stride + class, stride
            );
    transpose_elements(strip, tokens, out, stride, 0, whole_tokens, whole_classes, classes);
    transpose_elements(strip, tokens, out, stride, whole_tokens, tokens, 0, classes);
#ifdef __AVX__
    _mm_sfence();
#endif
}
