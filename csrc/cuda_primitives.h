// What the kernels ask of a GPU: threads, barriers, shuffles, shared memory of a cluster, asynchronous copies and
// special functions. tests/cuda_emulator/primitives.h has the same for CPUs and checks every access. Shared memory
// is named by its offset in bytes.
#pragma once

#include "kd_math.h"

// 128 registers a thread: as many smaller blocks as shared memory has room for.
#define FKD_KERNEL extern "C" __global__ __launch_bounds__(FKD_THREADS, 512 / FKD_THREADS)
#define FKD_INLINE static __forceinline__
#define FKD_UNROLL _Pragma("unroll")
#define FKD_ROLLED _Pragma("unroll 1")
#define FKD_WARP 32

extern __shared__ uint4 fkd_shared[];

FKD_INLINE int thread_index() { return (int)threadIdx.x; }

#if __CUDA_ARCH__ >= 900
FKD_INLINE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

FKD_INLINE int cluster_size() {
    int size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
#else  // a block is its own cluster
FKD_INLINE int cluster_rank() { return 0; }
FKD_INLINE int cluster_size() { return 1; }
#endif

FKD_INLINE int cluster_index() { return (int)blockIdx.x / cluster_size(); }
FKD_INLINE int cluster_count() { return (int)gridDim.x / cluster_size(); }

FKD_INLINE void block_barrier() { __syncthreads(); }

// Of all threads of the cluster; what they wrote to each other's shared memory before is seen after.
FKD_INLINE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    if (cluster_size() > 1) {
        __syncwarp();
        asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

// x[i] of the lane whose number differs by `mask`.
FKD_INLINE void shuffle_xor(float *x, int n, int mask) {
    FKD_UNROLL for (int i = 0; i < n; i++) x[i] = __shfl_xor_sync(0xffffffffu, x[i], mask);
}

// x[i] becomes the warp's largest; a NaN may win or lose. One instruction each instead of five shuffles.
FKD_INLINE void warp_max(float *x, int n) {
    FKD_UNROLL for (int i = 0; i < n; i++) {
        int bits = (int)as_bits(x[i]);
        bits = __reduce_max_sync(0xffffffffu, bits ^ ((bits >> 31) & 0x7fffffff));  // floats order as these integers do
        x[i] = as_float((uint32_t)(bits ^ ((bits >> 31) & 0x7fffffff)));
    }
}

// ---- shared memory

FKD_INLINE char *fkd_at(int offset) { return (char *)fkd_shared + offset; }
FKD_INLINE uint4 shared_read16(int offset) { return *(const uint4 *)fkd_at(offset); }
FKD_INLINE uint2 shared_read8(int offset) { return *(const uint2 *)fkd_at(offset); }
FKD_INLINE void shared_write16(int offset, uint4 x) { *(uint4 *)fkd_at(offset) = x; }
FKD_INLINE void shared_write2(int offset, uint32_t x) { *(uint16_t *)fkd_at(offset) = (uint16_t)x; }

// Into block `rank` of the cluster, which may be this one.
FKD_INLINE void remote_write16(int offset, int rank, uint4 x) {
#if __CUDA_ARCH__ >= 900
    const uint32_t here = (uint32_t)__cvta_generic_to_shared(fkd_at(offset));
    asm volatile(
        "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
        "st.shared::cluster.v4.b32 [there], {%2, %3, %4, %5};\n\t}" ::"r"(here), "r"(rank), "r"(x.x), "r"(x.y),
        "r"(x.z), "r"(x.w) : "memory");
#else
    shared_write16(offset, x);
#endif
}

// ---- asynchronous copies from global to shared memory, which a thread waits for on its own

#define FKD_COPY(level, bytes)                                                                \
    asm volatile("cp.async." level ".shared.global.L2::128B [%0], [%1], " bytes ", %2;" ::"r"(to), \
                 "l"(from), "r"(valid) : "memory")

// `size` bytes (4, 8 or 16, both addresses multiples of it), of which `valid` come from memory and the rest are 0.
FKD_INLINE void copy_async(int offset, const void *source, int size, int valid) {
    const uint32_t to = (uint32_t)__cvta_generic_to_shared(fkd_at(offset));
    const size_t from = __cvta_generic_to_global(source);
    if (size == 16)  // straight from L2
        FKD_COPY("cg", "16");
    else if (size == 8)
        FKD_COPY("ca", "8");
    else
        FKD_COPY("ca", "4");
}

FKD_INLINE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most the `newest` last committed groups are under way.
template <int newest> FKD_INLINE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory"); }

// ---- global memory

// An address that is to stay in registers: the compiler would rather multiply again for every slot.
FKD_INLINE void kept(const char **x) { asm volatile("" : "+l"(*x)); }


FKD_INLINE uint4 global_read16(const void *x) { return *(const uint4 *)x; }
FKD_INLINE uint2 global_read8(const void *x) { return *(const uint2 *)x; }
FKD_INLINE uint32_t global_read4(const void *x) { return *(const uint32_t *)x; }
FKD_INLINE uint32_t global_read2(const void *x) { return *(const uint16_t *)x; }
FKD_INLINE uint32_t global_read1(const void *x) { return *(const uint8_t *)x; }
FKD_INLINE void global_write16(void *x, uint4 value) { *(uint4 *)x = value; }
FKD_INLINE void global_write8(void *x, uint2 value) { *(uint2 *)x = value; }
FKD_INLINE void global_write4(void *x, uint32_t value) { *(uint32_t *)x = value; }
FKD_INLINE void global_write2(void *x, uint32_t value) { *(uint16_t *)x = (uint16_t)value; }
FKD_INLINE void global_write1(void *x, uint32_t value) { *(uint8_t *)x = (uint8_t)value; }

// ---- arithmetic

// 2**x within 2 ulp; subnormals are 0.
FKD_INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x within 1 ulp for normal x and result.
FKD_INLINE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// NaN if either is; fmaxf drops them.
FKD_INLINE float max_or_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

FKD_INLINE float half_to_float(uint32_t half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)half));
    return x;
}

// Two floats to nearest, the first in the low half.
FKD_INLINE uint32_t to_halves(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

FKD_INLINE uint32_t to_bf16s(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
