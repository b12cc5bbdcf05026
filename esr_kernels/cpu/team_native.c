/* Rows shared out among the threads that PyTorch has: `parallel` is GOMP_parallel of the OpenMP
 * library that it loaded. Threads of our own would compete with those, which spin for a while after
 * every operation of PyTorch.
 */
#include <stdatomic.h>
#include <stdint.h>

typedef void work(const void *what, int64_t first, int64_t last);
typedef void parallel(void (*part)(void *), void *shared, unsigned threads, unsigned flags);

struct shared {
    work *run;
    const void *what;
    int64_t rows, parts;
    atomic_int_least64_t next;
};

/* Parts are taken in turn: fewer threads than asked for would do them all the same. */
static void take_parts(void *of) {
    struct shared *x = of;
    for (;;) {
        int64_t part = atomic_fetch_add(&x->next, 1);
        if (part >= x->parts) return;
        x->run(x->what, x->rows * part / x->parts, x->rows * (part + 1) / x->parts);
    }
}

void over_rows(
    parallel *start, work *run, const void *what, int64_t rows, int64_t parts, unsigned threads
) {
    struct shared x = {run, what, rows, parts, 0};
    start(take_parts, &x, threads, 0);
}
