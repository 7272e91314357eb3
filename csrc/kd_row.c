// The row on CPUs. Meaning of inputs and outputs: fused_kd/rows/contract.py.
//
// A row is swept in blocks that stay in the first-level cache:
//   1. every logit's exponential over its block's maximum is kept in scratch, the blocks' sums give the statistics
//      of the row (normalisers, KL(p||q), difficulty);
//   2. terms whose divergence is not KL(t||q) evaluate h and g: sum h is the value, the sum of multiples of g is kept,
//      of a single term in place of the teacher's exponentials. Once for all terms, but where the multiple follows
//      from sum h;
//   3. the gradient is then a linear combination of what scratch holds.
// Rows of a top-k teacher are condensed to a short dense row between sweep 1 and 3.
//
// fused_kd/rows/expressions.py puts before this file: FKD_DIVERGENCES(X), X(name, h, g) with C expressions over t, q, d,
// r, log_r, s, log_s, beta, alpha, w, u and v; FKD_SCALARS(X), FKD_TRAITS(X) and FKD_STATISTICS(X), X(name); GATE_ and
// OUTER_ numbers of traits; and the numbers of fused_kd/divergences.py that stand for something, such as LOG_ZERO.
//
// Sums run in fp32 within a block and in double beyond it. NaN logits become NaN losses: comparisons are written so
// that NaN falls through, and nothing here may be compiled with -ffast-math.

#include <stdatomic.h>

#include "kd_gemm.h"
#include "kd_largest.h"
#include "kd_mixing.h"
#include "kd_top_k_row.h"

static void ignored_row(const Call *c, int64_t row) {
    c->loss[row] = c->difficulty[row] = 0.0f;
    c->is_hard[row] = 0;
    if (c->statistics) memset(c->statistics + row * c->told, 0, (size_t)c->told * sizeof(float));
    if (!c->dlogits) return;
    const size_t size = c->dlogits_dtype == FP32 ? 4 : 2;
    memset((char *)c->dlogits + (size_t)(row * c->dlogits_stride) * size, 0, (size_t)c->V * size);
}

// Bytes of scratch that a thread needs; K of a top-k teacher, else 0.
int64_t fkd_scratch(int64_t V, int64_t K, int terms) { return row_scratch(V, terms) + top_k_scratch(K, terms); }

typedef struct {
    const Call *call;
    atomic_llong next_row;
    atomic_int next_thread;
} Work;

static void work_on_rows(void *shared) {
    Work *work = shared;
    const Call *c = work->call;
    const int64_t bytes = fkd_scratch(c->V, c->lists.K, c->term_count);
    char *scratch = c->scratch + atomic_fetch_add(&work->next_thread, 1) * bytes;
    Row r = new_row(c, scratch);
    const Categories small = new_categories(c->lists.K, c->term_count, scratch + row_scratch(c->V, c->term_count));
    for (int64_t row; (row = atomic_fetch_add(&work->next_row, 1)) < c->C;) {
        set_row(&r, row);
        if (r.label < 0)
            ignored_row(c, row);
        else if (!c->needs_teacher)
            cross_entropy_row(&r);
        else if (c->lists.indices && !c->lists.uniform)
            top_k_row(&r, &small);
        else
            distilled_row(&r);
    }
}

// `parallel` is GOMP_parallel of the OpenMP runtime that PyTorch uses: one thread pool, whatever compiled this file.
void fkd_row(const Call *call, void (*parallel)(void (*)(void *), void *, unsigned, unsigned), unsigned threads) {
    Work work = {.call = call};
    if (threads > 1)
        parallel(work_on_rows, &work, threads, 0);
    else
        work_on_rows(&work);
}
