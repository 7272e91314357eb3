// Where a row lies in a cluster. A slot is FKD_WIDTH elements of a row that one thread owns: only it copies, reads and
// overwrites them, so that it waits for its own copies and for nobody's barrier. The first `resident` slots of each
// thread stay in shared memory from the first sweep to the last; the rest of longer rows is read in every sweep.
//
// The first `ahead` of them have a second place, where the next row's are asked for as soon as a row begins: memory
// then has work to do in sweeps that read nothing. Rows take the two places in turn. The other slots of the next row
// are asked for in sweep 3, each as soon as it is free.
//
// Slot `i` of a cluster's threads is one stretch of the row. With FKD_VECTOR a thread's elements are neighbours, moved
// by one instruction; rows that are not aligned for that are dealt out one element to each thread in turn.
//
// Macros from fused_kd/rows/cuda/build.py: FKD_THREADS, FKD_WIDTH, FKD_VECTOR, FKD_SHAPED (a scale or softcap),
// FKD_STUDENT, FKD_TEACHER and FKD_DLOGITS (dtypes), FKD_LISTED (a teacher of entries and one value for all others),
// FKD_WHOLE (every slot is resident).
#pragma once

#include "cuda_math.h"

enum Dtype { FP32, BF16, FP16 };

#define FKD_SCALAR(name) SCALAR_##name,
enum Scalar { FKD_SCALARS(FKD_SCALAR) SCALARS };  // where those of fused_kd.terms.Scalars lie in a term's

#define FKD_STEP (FKD_VECTOR ? 1 : FKD_THREADS)  // columns from a thread's element to its next
#ifndef FKD_MOST
#define FKD_MOST FKD_WIDTH
#endif

typedef struct {
    const char *data;  // (C, V), unit stride along V; of a listed teacher (C, K) fp32
    int64_t stride;    // bytes from row to row
    float scale, cap;  // final logit: scale * raw, or with a cap (not 0) cap * tanh(scale * raw / cap)
} Side;

typedef struct {
    Side student, teacher;
    char *dlogits;  // (C, V) or NULL; may be the student's logits
    int64_t dlogits_stride;
    const int64_t *entries;  // (C, K) ascending columns of a listed teacher
    const float *rest;       // (C,) its logit of all other columns
    int K, V;
    int slots, resident, ahead;  // of each thread
    int turn;                    // this row's first `ahead` slots are so many behind their first place
    int column, column_step;     // of this thread's first slot, and from slot to slot
    int student_at, teacher_at;  // its first slots in shared memory
} Rows;

FKD_INLINE int size_of(int dtype) { return dtype == FP32 ? 4 : 2; }
FKD_INLINE int slot_bytes(int dtype) { return FKD_WIDTH * size_of(dtype); }

// `area` bytes at the start of shared memory are somebody else's.
FKD_INLINE void place(Rows *rows, int area) {
    const int tile = FKD_THREADS * FKD_WIDTH, thread = thread_index();
    rows->column = cluster_rank() * tile + thread * (FKD_VECTOR ? FKD_WIDTH : 1);
    rows->column_step = cluster_size() * tile;
    rows->slots = (rows->V + rows->column_step - 1) / rows->column_step;
    rows->resident = rows->resident < rows->slots ? rows->resident : rows->slots;
    rows->turn = 0;
    const int students = (rows->resident + rows->ahead) * FKD_THREADS * slot_bytes(FKD_STUDENT);
    rows->student_at = area + thread * slot_bytes(FKD_STUDENT);
    rows->teacher_at = area + students + thread * slot_bytes(FKD_TEACHER);
}

FKD_INLINE bool is_resident(const Rows *rows, int slot) { return FKD_WHOLE || slot < rows->resident; }

FKD_INLINE int column_of(const Rows *rows, int slot) { return rows->column + slot * rows->column_step; }
// The next row's turn.
FKD_INLINE int next_turn(const Rows *rows) { return rows->resident - rows->turn; }

FKD_INLINE int place_of(const Rows *rows, int slot, int turn) { return slot + (slot < rows->ahead ? turn : 0); }
FKD_INLINE int student_slot(const Rows *rows, int slot, int turn) {
    return rows->student_at + place_of(rows, slot, turn) * FKD_THREADS * slot_bytes(FKD_STUDENT);
}
FKD_INLINE int teacher_slot(const Rows *rows, int slot, int turn) {
    return rows->teacher_at + place_of(rows, slot, turn) * FKD_THREADS * slot_bytes(FKD_TEACHER);
}

// Which of a slot's elements a column is; none if outside of [0, FKD_WIDTH).
FKD_INLINE int element_of(int first, int column) {
    const int distance = column - first;
    if (FKD_VECTOR) return distance;
    return distance % FKD_THREADS == 0 ? distance / FKD_THREADS : -1;
}

// ---- numbers

FKD_INLINE float from_bits(int dtype, uint32_t bits) {
    if (dtype == FP32) return as_float(bits);
    return dtype == BF16 ? as_float(bits << 16) : half_to_float(bits);
}

FKD_INLINE uint32_t to_bits(int dtype, float x) {
    if (dtype == FP32) return as_bits(x);
    return (dtype == BF16 ? to_bf16s(x, 0.0f) : to_halves(x, 0.0f)) & 0xffffu;
}

// A slot's elements from its bytes, in words.
FKD_INLINE void unpack(int dtype, const uint32_t *words, float *x) {
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++)
        x[i] = dtype == FP32 ? as_float(words[i]) : from_bits(dtype, words[i / 2] >> 16 * (i & 1) & 0xffffu);
}

FKD_INLINE void read_slot(int dtype, int offset, float *x) {
    uint32_t words[4];
    if (slot_bytes(dtype) == 16) {
        const uint4 all = shared_read16(offset);
        words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    } else {
        const uint2 all = shared_read8(offset);
        words[0] = all.x, words[1] = all.y;
    }
    unpack(dtype, words, x);
}

FKD_INLINE void write_slot(int offset, const float *x) { shared_write16(offset, words_of(x)); }  // fp32

FKD_INLINE uint32_t read_element(int dtype, const char *x) { return dtype == FP32 ? global_read4(x) : global_read2(x); }

// A slot's elements from global memory; what lies beyond the row is not touched.
FKD_INLINE void read_row(int dtype, const char *row, int column, int V, float *x) {
    const char *first = row + (int64_t)column * size_of(dtype);
    if (FKD_VECTOR && column + FKD_WIDTH <= V) {
        uint32_t words[4];
        if (slot_bytes(dtype) == 16) {
            const uint4 all = global_read16(first);
            words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
        } else {
            const uint2 all = global_read8(first);
            words[0] = all.x, words[1] = all.y;
        }
        unpack(dtype, words, x);
        return;
    }
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
        x[i] = 0.0f;
        if (column + i * FKD_STEP < V)
            x[i] = from_bits(dtype, read_element(dtype, first + i * FKD_STEP * size_of(dtype)));
    }
}

FKD_INLINE void write_row(const Rows *rows, int64_t row, int column, const float *x) {
    const int size = size_of(FKD_DLOGITS);
    char *first = rows->dlogits + row * rows->dlogits_stride + (int64_t)column * size;
    if (FKD_VECTOR && column + FKD_WIDTH <= rows->V) {
        uint32_t words[4];
        FKD_UNROLL for (int i = 0; i < slot_bytes(FKD_DLOGITS) / 4; i++) {
            if (FKD_DLOGITS == FP32)
                words[i] = as_bits(x[i]);
            else
                words[i] = FKD_DLOGITS == BF16 ? to_bf16s(x[2 * i], x[2 * i + 1]) : to_halves(x[2 * i], x[2 * i + 1]);
        }
        uint4 all;
        all.x = words[0], all.y = words[1];
        if (slot_bytes(FKD_DLOGITS) == 16) {
            all.z = words[2], all.w = words[3];
            global_write16(first, all);
        } else {
            uint2 half;
            half.x = all.x, half.y = all.y;
            global_write8(first, half);
        }
        return;
    }
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
        if (column + i * FKD_STEP >= rows->V) continue;
        if (FKD_DLOGITS == FP32)
            global_write4(first + i * FKD_STEP * size, as_bits(x[i]));
        else
            global_write2(first + i * FKD_STEP * size, to_bits(FKD_DLOGITS, x[i]));
    }
}

// ---- asking for a row's slots

// Of a slot that lies in the row, `all` of it or its beginning.
FKD_INLINE void request(int dtype, const char *row, int column, int V, int offset, bool all) {
    const char *first = row + (int64_t)column * size_of(dtype);
    if (FKD_VECTOR) {
        copy_async(offset, first, slot_bytes(dtype), all ? slot_bytes(dtype) : (V - column) * size_of(dtype));
        return;
    }
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
        if (column + i * FKD_STEP >= V) continue;
        const char *from = first + i * FKD_STEP * size_of(dtype);
        if (dtype == FP32)
            copy_async(offset + 4 * i, from, 4, 4);
        else  // nothing asynchronous is as narrow
            shared_write2(offset + 2 * i, global_read2(from));
    }
}

// Where a row of both sides begins.
typedef struct {
    const char *student, *teacher;
} Begin;

FKD_INLINE Begin begin_of(const Rows *rows, int64_t row) {
    Begin begin;
    begin.student = rows->student.data + row * rows->student.stride;
    begin.teacher = rows->teacher.data + row * rows->teacher.stride;
    kept(&begin.student);
    kept(&begin.teacher);
    return begin;
}

// Of both sides; what is there may be overwritten from now on.
FKD_INLINE void request_slot(const Rows *rows, const Begin *row, int slot, int turn) {
    const int column = column_of(rows, slot), V = rows->V;
    const int student = student_slot(rows, slot, turn), teacher = teacher_slot(rows, slot, turn);
    const bool both = FKD_TEACHER >= 0 && !FKD_LISTED;
    if (!FKD_VECTOR || column + FKD_WIDTH <= V) {
        request(FKD_STUDENT, row->student, column, V, student, true);
        if (both) request(FKD_TEACHER, row->teacher, column, V, teacher, true);
    } else if (column < V) {
        request(FKD_STUDENT, row->student, column, V, student, false);
        if (both) request(FKD_TEACHER, row->teacher, column, V, teacher, false);
    }
}

// Copies are counted in this many groups of slots, so that a sweep can begin with the first. Each group is committed
// twice, the slots ahead while the row before is in sweep 1 and the others while it is in sweep 3, even where one of
// these has no slot: behind any group, the same number is then under way.
#define FKD_GROUPS 4
FKD_INLINE int group_end(const Rows *rows, int group) {
    return (int)((uint32_t)((group + 1) * rows->resident + FKD_GROUPS - 1) / FKD_GROUPS);
}

// In sweep 1, which has committed a group of the next row for every group before this one.
FKD_INLINE void group_wait(const Rows *rows, int group) {
    if (group_end(rows, group) <= rows->ahead)
        copies_wait<2 * FKD_GROUPS - 1>();
    else
        copies_wait<FKD_GROUPS - 1>();
}

// Slots from `first` on and before `end`.
FKD_INLINE void request_slots(const Rows *rows, int64_t row, int turn, int first, int end) {
    const Begin begin = begin_of(rows, row);
    int slot = 0;
    FKD_ROLLED for (int group = 0; group < FKD_GROUPS; group++) {
        FKD_ROLLED for (; slot < group_end(rows, group); slot++)
            if (slot >= first && slot < end) request_slot(rows, &begin, slot, turn);
        copies_commit();
    }
}

// ---- logits

// The final logit before the temperature, and d final / d raw. -inf becomes LOG_ZERO, as in the maxima: a row may have
// nothing else.
FKD_INLINE float final_logit(const Side *side, float raw, float *slope) {
    if (!FKD_SHAPED) return max_or_nan(raw, LOG_ZERO);
    *slope = side->scale;
    // Not before: a large factor would make it -inf again.
    if (side->cap == 0.0f) return max_or_nan(raw * side->scale, LOG_ZERO);
    float steepness;
    const float z = max_or_nan(raw * (side->scale * reciprocal(side->cap)), LOG_ZERO);
    const float capped = side->cap * squash(z, &steepness);
    *slope *= steepness;
    return capped;
}

FKD_INLINE void final_logits(const Side *side, float *x, float *slope) {
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) x[i] = final_logit(side, x[i], &slope[i]);
}

FKD_INLINE int64_t entry(const Rows *rows, int64_t row, int i) {
    const uint2 bits = global_read8(rows->entries + row * rows->K + i);
    return (int64_t)((uint64_t)bits.y << 32 | bits.x);
}

// Position of the first entry that is not before `column`.
FKD_INLINE int first_entry(const Rows *rows, int64_t row, int column) {
    int low = 0, high = rows->K;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (entry(rows, row, middle) < column)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// The entry of a slot's element `i`, or -1. `next` is kept from element to element.
FKD_INLINE int entry_of(const Rows *rows, int64_t row, int first, int i, int *next) {
    const int column = first + i * FKD_STEP;
    if (i == 0 || FKD_STEP > 1) *next = first_entry(rows, row, column);
    return *next < rows->K && entry(rows, row, *next) == column ? (*next)++ : -1;
}

FKD_INLINE void listed_logits(const Rows *rows, int64_t row, int column, float *x) {
    const char *values = rows->teacher.data + row * rows->teacher.stride;
    const float rest = as_float(global_read4(rows->rest + row));
    int next;
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
        const int own = entry_of(rows, row, column, i, &next);
        x[i] = own < 0 ? rest : as_float(global_read4(values + 4 * (int64_t)own));
    }
}

FKD_INLINE void raw_teacher(const Rows *rows, int64_t row, int slot, bool resident, bool first_time, float *x) {
    const int column = column_of(rows, slot), offset = teacher_slot(rows, slot, rows->turn);
    if (FKD_LISTED && (first_time || !resident)) {
        listed_logits(rows, row, column, x);
        if (resident) write_slot(offset, x);
    } else if (resident)
        read_slot(FKD_TEACHER, offset, x);
    else
        read_row(FKD_TEACHER, rows->teacher.data + row * rows->teacher.stride, column, rows->V, x);
}

// A slot's final logits, of the teacher where there is one. `first_time` fills a listed teacher's slots.
FKD_INLINE void slot_logits(const Rows *rows, int64_t row, int slot, bool resident, bool first_time, float *z_s,
                            float *slope, float *z_t) {
    const int column = column_of(rows, slot);
    if (resident)
        read_slot(FKD_STUDENT, student_slot(rows, slot, rows->turn), z_s);
    else
        read_row(FKD_STUDENT, rows->student.data + row * rows->student.stride, column, rows->V, z_s);
    final_logits(&rows->student, z_s, slope);
    if (FKD_TEACHER >= 0) {
        float unused[FKD_MOST];
        raw_teacher(rows, row, slot, resident, first_time, z_t);
        final_logits(&rows->teacher, z_t, unused);
    }
    if (column + (FKD_WIDTH - 1) * FKD_STEP < rows->V) return;
    FKD_UNROLL for (int i = 0; i < FKD_WIDTH; i++) {
        if (column + i * FKD_STEP < rows->V) continue;
        z_s[i] = OUTSIDE;
        if (FKD_TEACHER >= 0) z_t[i] = OUTSIDE;
    }
}
