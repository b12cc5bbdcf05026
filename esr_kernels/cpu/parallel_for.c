/* A loop over rows on the threads of PyTorch's OpenMP library: `gomp_parallel` is its GOMP_parallel.
 * Other threads would compete with those for the cores, since OpenMP's threads spin for a while after
 * each parallel region.
 */
#include <stdatomic.h>
#include <stdint.h>

typedef void body_function(const void *arguments, int64_t first, int64_t last);
typedef void gomp_function(void (*body)(void *), void *data, unsigned threads, unsigned flags);

struct loop {
    body_function *body;
    const void *arguments;
    int64_t rows, parts;
    atomic_int_least64_t next_part;
};

/* Each thread takes the next part until none is left, so all parts are done even if OpenMP starts
 * fewer threads than requested. */
static void run_parts(void *data) {
    struct loop *loop = data;
    for (;;) {
        int64_t part = atomic_fetch_add(&loop->next_part, 1);
        if (part >= loop->parts) return;
        int64_t first = loop->rows * part / loop->parts;
        int64_t last = loop->rows * (part + 1) / loop->parts;
        loop->body(loop->arguments, first, last);
    }
}

void parallel_for(
    gomp_function *gomp_parallel, body_function *body, const void *arguments, int64_t rows,
    int64_t parts, unsigned threads
) {
    struct loop loop = {body, arguments, rows, parts, 0};
    gomp_parallel(run_parts, &loop, threads, 0);
}
