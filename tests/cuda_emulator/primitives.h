// The primitives of csrc/cuda_primitives.h on a CPU: every thread of a cluster is a thread of the process. Each access
// is checked: its alignment and bounds; that shared memory which another thread wrote or read is ordered by a barrier
// in between, whatever the schedule happened to be; that copies are waited for, because until then their target holds
// NaN. The first fault is kept, and the access that made it left out.
//
// What the kernels are compiled for on a GPU is chosen at run time here: one build does for all.
#pragma once

#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "kd_math.h"

struct Macros {  // mirrored by tests/cuda_emulator/__init__.py
    int32_t threads, width, vector, shaped, student, teacher, dlogits, listed, cold, whole, excludes;
    int32_t terms, main, term[8];
};
static Macros macros;

#define FKD_THREADS macros.threads
#define FKD_WIDTH macros.width
#define FKD_MOST 8
#define FKD_VECTOR macros.vector
#define FKD_SHAPED macros.shaped
#define FKD_STUDENT macros.student
#define FKD_TEACHER macros.teacher
#define FKD_DLOGITS macros.dlogits
#define FKD_LISTED macros.listed
#define FKD_TERMS macros.terms
#define FKD_MOST_TERMS 8
#define FKD_MAIN macros.main
#define FKD_TERM_0 macros.term[0]
#define FKD_TERM_1 macros.term[1]
#define FKD_TERM_2 macros.term[2]
#define FKD_TERM_3 macros.term[3]
#define FKD_TERM_4 macros.term[4]
#define FKD_TERM_5 macros.term[5]
#define FKD_TERM_6 macros.term[6]
#define FKD_TERM_7 macros.term[7]
#define FKD_EXCLUDES macros.excludes
#define FKD_COLD macros.cold
#define FKD_WHOLE macros.whole

#define FKD_KERNEL static
#define FKD_INLINE static inline
#define FKD_UNROLL
#define FKD_ROLLED
#ifndef FKD_WARP
#define FKD_WARP 4
#endif

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};

// ---- faults

struct Range {
    uintptr_t begin, end;
    bool writable;
};

static std::mutex fault_lock;
static char fault[512];
static std::vector<Range> ranges;  // of global memory, ascending

struct Stuck {};  // thrown by threads at a barrier once there is a fault
static std::atomic<bool> stuck;

static void report(const char *format, ...) {
    std::lock_guard<std::mutex> hold(fault_lock);
    stuck = true;
    if (fault[0]) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(fault, sizeof fault, format, arguments);
    va_end(arguments);
}

class Barrier {
  public:
    void of(int threads) { expected = threads; }
    void wait() {
        std::unique_lock<std::mutex> hold(lock);
        const int round = rounds;
        if (++waiting == expected) {
            waiting = 0;
            rounds++;
            everybody.notify_all();
            return;
        }
        const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(5);
        while (!everybody.wait_for(hold, std::chrono::milliseconds(100), [&] { return rounds != round; })) {
            if (!stuck && std::chrono::steady_clock::now() < patience) continue;
            report("a barrier that not all threads reach");
            throw Stuck();
        }
    }

  private:
    std::mutex lock;
    std::condition_variable everybody;
    int expected = 0, waiting = 0, rounds = 0;
};

// ---- threads

struct Access {  // the last of its kind to a word; `thread` counts through the cluster
    int thread = -1, block = -1, barriers = -1, cluster_barriers = -1;
    bool others = false;  // more threads since the same barrier
};

struct Warp {
    Barrier barrier;
    float values[FKD_WARP][16];
};

struct Block {
    std::vector<char> memory;
    std::vector<Access> written, read;  // a word each
    std::mutex lock;
    Barrier barrier;
    std::vector<Warp> warps;
};

struct Copy {
    int offset;
    const char *source;
    int size, valid;
};

struct Cluster {
    std::vector<Block> blocks;
    Barrier barrier;
    int index, count;
};

struct Thread {
    Cluster *cluster;
    int block, index, barriers = 0, cluster_barriers = 0;
    std::vector<std::vector<Copy>> copies;
    std::vector<Copy> open;
    Block &own() const { return cluster->blocks[(size_t)block]; }
    int number() const { return block * FKD_THREADS + index; }
};
static thread_local Thread *me;

FKD_INLINE int thread_index() { return me->index; }
FKD_INLINE int cluster_rank() { return me->block; }
FKD_INLINE int cluster_size() { return (int)me->cluster->blocks.size(); }
FKD_INLINE int cluster_index() { return me->cluster->index; }
FKD_INLINE int cluster_count() { return me->cluster->count; }

FKD_INLINE void block_barrier() {
    me->own().barrier.wait();
    me->barriers++;
}

FKD_INLINE void cluster_barrier() {
    me->cluster->barrier.wait();
    me->barriers++;
    me->cluster_barriers++;
}

FKD_INLINE void shuffle_xor(float *x, int n, int mask) {
    Warp &warp = me->own().warps[(size_t)(me->index / FKD_WARP)];
    const int lane = me->index % FKD_WARP;
    std::copy(x, x + n, warp.values[lane]);
    warp.barrier.wait();
    std::copy(warp.values[lane ^ mask], warp.values[lane ^ mask] + n, x);
    warp.barrier.wait();
}

FKD_INLINE void warp_max(float *x, int n) {
    for (int mask = FKD_WARP / 2; mask > 0; mask /= 2) {
        float other[16];
        std::copy(x, x + n, other);
        shuffle_xor(other, n, mask);
        for (int i = 0; i < n; i++) x[i] = fmaxf(x[i], other[i]);
    }
}

// ---- shared memory

static bool ordered(const Access &before, const Thread &now) {
    if (before.thread < 0 || (before.thread == now.number() && !before.others)) return true;
    if (before.block == now.block) return now.barriers > before.barriers;
    return now.cluster_barriers > before.cluster_barriers;
}

static void note(Access &access, const Thread &now) {
    const bool same = access.block == now.block && access.barriers == now.barriers && access.thread >= 0;
    access.others = same && (access.others || access.thread != now.number());
    access.thread = now.number();
    access.block = now.block;
    access.barriers = now.barriers;
    access.cluster_barriers = now.cluster_barriers;
}

static bool touch(int rank, int offset, int size, bool write, const char *what) {
    if (rank < 0 || rank >= cluster_size()) {
        report("%s of block %d in a cluster of %d", what, rank, cluster_size());
        return false;
    }
    Block &block = me->cluster->blocks[(size_t)rank];
    if (offset < 0 || (size_t)(offset + size) > block.memory.size() || offset % size) {
        report("%s of %d bytes at %d of %zu bytes of shared memory", what, size, offset, block.memory.size());
        return false;
    }
    std::lock_guard<std::mutex> hold(block.lock);
    for (int word = offset / 4; word <= (offset + size - 1) / 4; word++) {
        Access &written = block.written[(size_t)word], &read = block.read[(size_t)word];
        if (!ordered(written, *me) || (write && !ordered(read, *me))) {
            report("%s at %d of shared memory races: no barrier since another thread's access", what, offset);
            return false;
        }
        note(write ? written : read, *me);
    }
    return true;
}

template <typename T> static T shared_read(int offset) {
    T x;
    memset(&x, 0xff, sizeof x);
    if (touch(me->block, offset, sizeof x, false, "read")) memcpy(&x, &me->own().memory[(size_t)offset], sizeof x);
    return x;
}

template <typename T> static void shared_write(int offset, int rank, T x) {
    if (touch(rank, offset, sizeof x, true, "write"))
        memcpy(&me->cluster->blocks[(size_t)rank].memory[(size_t)offset], &x, sizeof x);
}

FKD_INLINE uint4 shared_read16(int offset) { return shared_read<uint4>(offset); }
FKD_INLINE uint2 shared_read8(int offset) { return shared_read<uint2>(offset); }
FKD_INLINE void shared_write16(int offset, uint4 x) { shared_write(offset, me->block, x); }
FKD_INLINE void shared_write2(int offset, uint32_t x) { shared_write(offset, me->block, (uint16_t)x); }
FKD_INLINE void remote_write16(int offset, int rank, uint4 x) { shared_write(offset, rank, x); }

// ---- global memory

static bool allowed(const void *x, int size, int alignment, bool write) {
    const uintptr_t begin = (uintptr_t)x;
    auto after = std::upper_bound(ranges.begin(), ranges.end(), begin, [](uintptr_t at, const Range &range) {
        return at < range.begin;
    });
    const bool inside = after != ranges.begin() && begin + (uintptr_t)size <= (after - 1)->end;
    if (!inside || (write && !(after - 1)->writable)) {
        report("global %s of %d bytes outside of the tensors", write ? "write" : "read", size);
        return false;
    }
    if (begin % (uintptr_t)alignment) report("global access of %d bytes at an address that is no multiple", alignment);
    return begin % (uintptr_t)alignment == 0;
}

template <typename T> static T global_read(const void *x) {
    T value;
    memset(&value, 0xff, sizeof value);
    if (allowed(x, sizeof value, sizeof value, false)) memcpy(&value, x, sizeof value);
    return value;
}

template <typename T> static void global_write(void *x, T value) {
    if (allowed(x, sizeof value, sizeof value, true)) memcpy(x, &value, sizeof value);
}

FKD_INLINE void kept(const char **) {}
FKD_INLINE uint4 global_read16(const void *x) { return global_read<uint4>(x); }
FKD_INLINE uint2 global_read8(const void *x) { return global_read<uint2>(x); }
FKD_INLINE uint32_t global_read4(const void *x) { return global_read<uint32_t>(x); }
FKD_INLINE uint32_t global_read2(const void *x) { return global_read<uint16_t>(x); }
FKD_INLINE uint32_t global_read1(const void *x) { return global_read<uint8_t>(x); }
FKD_INLINE void global_write16(void *x, uint4 value) { global_write(x, value); }
FKD_INLINE void global_write8(void *x, uint2 value) { global_write(x, value); }
FKD_INLINE void global_write4(void *x, uint32_t value) { global_write(x, value); }
FKD_INLINE void global_write2(void *x, uint32_t value) { global_write(x, (uint16_t)value); }
FKD_INLINE void global_write1(void *x, uint32_t value) { global_write(x, (uint8_t)value); }

// ---- asynchronous copies

FKD_INLINE void copy_async(int offset, const void *source, int size, int valid) {
    if ((size != 4 && size != 8 && size != 16) || valid < 0 || valid > size)
        report("a copy of %d of %d bytes", valid, size);
    if (!allowed(source, valid, size, false) || !touch(me->block, offset, size, true, "copy")) return;
    memset(&me->own().memory[(size_t)offset], 0xff, (size_t)size);
    me->open.push_back({offset, (const char *)source, size, valid});
}

FKD_INLINE void copies_commit() {
    me->copies.push_back(me->open);
    me->open.clear();
}

template <int newest> FKD_INLINE void copies_wait() {
    while ((int)me->copies.size() > newest) {
        for (const Copy &copy : me->copies.front()) {
            if (!touch(me->block, copy.offset, copy.size, true, "copy")) continue;
            char *to = &me->own().memory[(size_t)copy.offset];
            memset(to, 0, (size_t)copy.size);
            memcpy(to, copy.source, (size_t)copy.valid);
        }
        me->copies.erase(me->copies.begin());
    }
}

// ---- arithmetic

FKD_INLINE float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
FKD_INLINE float reciprocal_fast(float x) { return 1.0f / x; }
FKD_INLINE float max_or_nan(float x, float y) { return x != x || y != y ? x + y : fmaxf(x, y); }
FKD_INLINE float half_to_float(uint32_t half) { return from_fp16((uint16_t)half); }
FKD_INLINE uint32_t to_halves(float low, float high) { return to_fp16(low) | (uint32_t)to_fp16(high) << 16; }
FKD_INLINE uint32_t to_bf16s(float low, float high) { return to_bf16(low) | (uint32_t)to_bf16(high) << 16; }
