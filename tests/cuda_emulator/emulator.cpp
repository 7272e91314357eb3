// Runs the kernels of csrc/ on threads of this process, one cluster after the other.
#include "primitives.h"

#include <utility>

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

// `arguments` are addresses of what the kernel takes, in its order.
template <typename... P, size_t... I>
static const char *launch(const Grid *grid, const Macros *chosen, void (*kernel)(P...), void **arguments,
                          std::index_sequence<I...>) {
    return run(grid, chosen, [=] { kernel(*(P *)arguments[I]...); });
}

template <typename... P>
static const char *launch(const Grid *grid, const Macros *chosen, void (*kernel)(P...), void **arguments) {
    return launch(grid, chosen, kernel, arguments, std::index_sequence_for<P...>());
}

#define EMULATE(name)                                                                                  \
    extern "C" const char *emulate_##name(const Grid *grid, const Macros *chosen, void **arguments) { \
        return launch(grid, chosen, fkd_##name, arguments);                                            \
    }
EMULATE(row)
EMULATE(condense)
EMULATE(expand)
