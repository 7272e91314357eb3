// A top-k teacher's rows on NVIDIA GPUs: the two sweeps around the row over K + 2 categories, whose meaning is in
// fused_kd/rows/top_k.py. A block takes a row at a time; fkd_condense reads the student's logits once, fkd_expand once
// more. Special functions an element: 1 ex2 each, 2 with FKD_COLD, and 1 ex2 and 1 rcp of a softcap.
//
// Macros: of cuda_slots.h, without a teacher (FKD_TEACHER is -1); FKD_COLD; FKD_EXPAND, which of the two kernels is
// compiled (without it both).

#include "cuda_slots.h"
#include "cuda_sums.h"

typedef struct {
    Rows rows;  // its entries are the teacher's, K of a row
    const int64_t *labels;
    const float *scalars;
    int64_t scalars_stride;  // elements from row to row, 0: all rows share them
} TopK;

FKD_INLINE float temperature_of(const TopK *call, int64_t row) {
    return as_float(global_read4(call->scalars + row * call->scalars_stride + SCALAR_temperature));
}

FKD_INLINE bool ignored(const TopK *call, int64_t row) { return (int32_t)global_read8(call->labels + row).y < 0; }

// Strides in bytes.
FKD_INLINE TopK call_of(const void *student, int64_t student_stride, float scale, float cap, void *dlogits,
                        int64_t dlogits_stride, const int64_t *entries, int K, int V, const int64_t *labels,
                        const float *scalars, int64_t scalars_stride) {
    TopK call;
    Rows *rows = &call.rows;
    rows->student.data = (const char *)student, rows->student.stride = student_stride;
    rows->student.scale = scale, rows->student.cap = cap;
    rows->teacher = rows->student;
    rows->dlogits = (char *)dlogits, rows->dlogits_stride = dlogits_stride;
    rows->entries = entries, rows->rest = 0;
    rows->K = K, rows->V = V, rows->resident = 0, rows->ahead = 0;
    place(rows, FKD_RECORDS_BYTES);
    call.labels = labels, call.scalars = scalars, call.scalars_stride = scalars_stride;
    return call;
}

// The final logit of entry `i`, or LOG_ZERO where there is none.
FKD_INLINE float entry_logit(const TopK *call, int64_t row, int i) {
    const Rows *rows = &call->rows;
    const int64_t column = entry(rows, row, i);
    if (column >= rows->V) return LOG_ZERO;
    const Side *side = &rows->student;
    const char *at = side->data + row * side->stride + column * size_of(FKD_STUDENT);
    float slope;
    return final_logit(side, from_bits(FKD_STUDENT, read_element(FKD_STUDENT, at)), &slope);
}

#if !defined(FKD_EXPAND) || !FKD_EXPAND
// categories (C, K + 1): the entries' final logits and the rest's log-sum-exp times the temperature, all relative to
// origins (C,), the largest logit, lest an offset swallow their digits; cold (C,) or NULL: the rest's at temperature 1.
FKD_KERNEL void fkd_condense(const void *student, int64_t student_stride,  // strides in bytes
                             float student_scale, float student_cap,
                             const int64_t *entries, int32_t K, int64_t C, int32_t V, const int64_t *labels,
                             const float *scalars, int64_t scalars_stride, float *categories, float *origins,
                             float *cold) {
    const TopK call = call_of(student, student_stride, student_scale, student_cap, 0, 0, entries, K, V, labels,
                              scalars, scalars_stride);
    const Rows *rows = &call.rows;
    int phase = 0;
    for (int64_t row = cluster_index(); row < C; row += cluster_count()) {
        const float T = temperature_of(&call, row), k = exponent_scale(T);
        float sums[FKD_RECORD];
        Pair totals[FKD_RECORD];
        no_statistics(sums);
        const int slots = ignored(&call, row) ? 0 : rows->slots;
        FKD_ROLLED for (int slot = 0; slot < slots; slot++) {
            float z[FKD_MOST], slope[FKD_MOST];
            slot_logits(rows, row, slot, false, false, z, slope, z);
            int next;
            FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++)
                if (entry_of(rows, row, column_of(rows, slot), i, &next) >= 0) z[i] = OUTSIDE;
            add_slot(sums, z, z, k);
        }
        // Where a dense row has its teacher's maximum, the entries'.
        for (int i = thread_index(); i < K; i += FKD_THREADS)
            sums[T_MAX] = fmaxf(sums[T_MAX], entry_logit(&call, row, i));
        reduce(sums, totals, FKD_RECORD, true, k, &phase);
        const float top = sums[S_MAX], origin = fmaxf(top, sums[T_MAX]);
        float *out = categories + row * (K + 1);
        for (int i = thread_index(); i < K; i += FKD_THREADS) {
            const float z = entry(rows, row, i) < V ? entry_logit(&call, row, i) - origin : LOG_ZERO;
            global_write4(out + i, as_bits(z));
        }
        if (thread_index() != 0) continue;
        global_write4(origins + row, as_bits(origin));
        global_write4(out + K, as_bits((top - origin) + log_of(totals[S_SUM - FKD_MAXIMA]) * T));
        if (FKD_COLD) global_write4(cold + row, as_bits((top - origin) + log_of(totals[COLD - FKD_MAXIMA])));
    }
}
#endif

#if !defined(FKD_EXPAND) || FKD_EXPAND
// d loss / d final logit: entry_gradient (C, K), rest_gradient (C,), and cold_gradient (C,) or NULL the rest's at
// temperature 1.
FKD_KERNEL void fkd_expand(const void *student, int64_t student_stride,  // strides in bytes
                           float student_scale, float student_cap,
                           void *dlogits, int64_t dlogits_stride, const int64_t *entries, int32_t K, int64_t C,
                           int32_t V, const int64_t *labels, const float *scalars, int64_t scalars_stride,
                           const float *categories, const float *origins, const float *cold, const float *entry_gradient,
                           const float *rest_gradient, const float *cold_gradient) {
    const TopK call = call_of(student, student_stride, student_scale, student_cap, dlogits, dlogits_stride, entries, K,
                              V, labels, scalars, scalars_stride);
    const Rows *rows = &call.rows;
    for (int64_t row = cluster_index(); row < C; row += cluster_count()) {
        const float k = exponent_scale(temperature_of(&call, row));
        const bool left_out = ignored(&call, row);
        const float origin = as_float(global_read4(origins + row));
        const float rest = as_float(global_read4(categories + row * (K + 1) + K));
        const float rest_share = as_float(global_read4(rest_gradient + row));
        float cold_rest = 0.0f, cold_share = 0.0f;
        if (FKD_COLD) {
            cold_rest = as_float(global_read4(cold + row));
            cold_share = as_float(global_read4(cold_gradient + row));
        }
        FKD_ROLLED for (int slot = 0; slot < rows->slots; slot++) {
            const int column = column_of(rows, slot);
            float z[FKD_MOST], slope[FKD_MOST];
            slot_logits(rows, row, slot, false, false, z, slope, z);
            int next;
            FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
                // At most 1 on unlisted entries; listed ones, replaced below, must not overflow.
                float x = rest_share * exp2_fast(fminf(((z[i] - origin) - rest) * k, 0.0f));
                if (FKD_COLD) x += cold_share * exp2_fast(fminf(((z[i] - origin) - cold_rest) * LOG2_E, 0.0f));
                const int own = entry_of(rows, row, column, i, &next);
                if (own >= 0) x = as_float(global_read4(entry_gradient + row * K + own));
                z[i] = left_out ? 0.0f : (FKD_SHAPED ? x * slope[i] : x);
            }
            write_row(rows, row, column, z);
        }
    }
}
#endif
