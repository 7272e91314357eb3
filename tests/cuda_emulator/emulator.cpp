// Runs the kernels of csrc/ on threads of this process, one cluster after the other.
#include "primitives.h"

#include "kd_row.cu"
#include "kd_top_k.cu"

struct Grid {  // mirrored by tests/cuda_emulator/__init__.py
    int32_t clusters, cluster_size, threads, shared_bytes, ranges;
    const uintptr_t *begins, *ends;
    const uint8_t *writable;
};

template <typename F> static const char *run(const Grid *grid, const Macros *chosen, F kernel) {
    macros = *chosen;
    macros.threads = grid->threads;
    fault[0] = 0;
    stuck = false;
    ranges.clear();
    for (int i = 0; i < grid->ranges; i++) ranges.push_back({grid->begins[i], grid->ends[i], grid->writable[i] != 0});
    for (int index = 0; index < grid->clusters; index++) {
        Cluster cluster;
        cluster.index = index, cluster.count = grid->clusters;
        cluster.blocks = std::vector<Block>((size_t)grid->cluster_size);
        cluster.barrier.of(grid->cluster_size * grid->threads);
        for (Block &block : cluster.blocks) {
            block.memory.assign((size_t)grid->shared_bytes, (char)0xff);  // NaN, whatever is read into it
            block.written.resize((size_t)grid->shared_bytes / 4 + 1);
            block.read.resize((size_t)grid->shared_bytes / 4 + 1);
            block.barrier.of(grid->threads);
            block.warps = std::vector<Warp>((size_t)(grid->threads / FKD_WARP));
            for (Warp &warp : block.warps) warp.barrier.of(FKD_WARP);
        }
        std::vector<std::thread> threads;
        for (int i = 0; i < grid->cluster_size * grid->threads; i++)
            threads.emplace_back([&, i] {
                Thread thread;
                thread.cluster = &cluster, thread.block = i / grid->threads, thread.index = i % grid->threads;
                me = &thread;
                try {
                    kernel();
                } catch (Stuck) {
                }
            });
        for (std::thread &thread : threads) thread.join();
    }
    return fault;
}

extern "C" const char *emulate_row(const Grid *grid, const Macros *chosen, const void *student, int64_t student_stride,
                                   float student_scale, float student_cap, const void *teacher, int64_t teacher_stride,
                                   float teacher_scale, float teacher_cap, void *dlogits, int64_t dlogits_stride,
                                   const int64_t *entries, const float *rest, int32_t K, int64_t C, int32_t V,
                                   int32_t resident, int32_t ahead, const int64_t *labels, const float *weights,
                                   const float *scalars, const uint8_t *given, float *loss, float *difficulty,
                                   uint8_t *is_hard) {
    return run(grid, chosen, [=] {
        fkd_row(student, student_stride, student_scale, student_cap, teacher, teacher_stride, teacher_scale,
                teacher_cap, dlogits, dlogits_stride, entries, rest, K, C, V, resident, ahead, labels, weights, scalars,
                given, loss, difficulty, is_hard);
    });
}

extern "C" const char *emulate_condense(const Grid *grid, const Macros *chosen, const void *student, int64_t stride,
                                        float scale, float cap, const int64_t *entries, int32_t K, int64_t C, int32_t V,
                                        const int64_t *labels, const float *scalars, float *categories, float *origins,
                                        float *cold) {
    return run(grid, chosen, [=] {
        fkd_condense(student, stride, scale, cap, entries, K, C, V, labels, scalars, categories, origins, cold);
    });
}

extern "C" const char *emulate_expand(const Grid *grid, const Macros *chosen, const void *student, int64_t stride,
                                      float scale, float cap, void *dlogits, int64_t dlogits_stride,
                                      const int64_t *entries, int32_t K, int64_t C, int32_t V, const int64_t *labels,
                                      const float *scalars, const float *categories, const float *origins,
                                      const float *cold, const float *entry_gradient, const float *rest_gradient,
                                      const float *cold_gradient) {
    return run(grid, chosen, [=] {
        fkd_expand(student, stride, scale, cap, dlogits, dlogits_stride, entries, K, C, V, labels, scalars, categories,
                   origins, cold, entry_gradient, rest_gradient, cold_gradient);
    });
}
