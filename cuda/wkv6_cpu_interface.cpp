// The CPU kernel's C interface, and the choice of the instruction set at run time.
#include <cstdlib>

#include "wkv6_cpu.h"

namespace {

using wkv6::Arguments;
using wkv6::Kernel;

enum Level { kAvx512, kAvx2, kPortable };

Level best_level() {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
        return kAvx512;
    if (avx2) return kAvx2;
#endif
    return kPortable;
}

const Kernel& kernel_for(int level) {
#if defined(__x86_64__)
    if (level < 0) level = best_level();
    if (level == kAvx512) return wkv6::kernel_avx512;
    if (level == kAvx2) return wkv6::kernel_avx2;
#endif
    (void)level;
    return wkv6::kernel_portable;
}

}  // namespace

extern "C" {

// The processor's best level: 0 AVX-512, 1 AVX2, 2 portable.
int wkv6_cpu_level() { return best_level(); }

// level: one of the above, or -1 for the best. Returns 0, or 1 where memory is missing.
int wkv6_cpu_forward(const void* r, const void* k, const void* v, const void* w, const float* u, const float* state,
                     void* y, float* final_state, float* checkpoints, int64_t sequences, int64_t tokens,
                     int64_t heads, int64_t head_size, const int64_t* cu_seqlens, int bfloat16, int level,
                     int threads) {
    Arguments a{};
    a.r = r, a.k = k, a.v = v, a.w = w, a.u = u, a.state = state, a.checkpoints = checkpoints;
    a.y = y, a.final_state = final_state;
    a.sequences = sequences, a.tokens = tokens, a.heads = heads, a.head_size = head_size;
    a.cu_seqlens = cu_seqlens, a.bfloat16 = bfloat16 != 0, a.threads = threads;
    return kernel_for(level).forward(a) ? 0 : 1;
}

int wkv6_cpu_backward(const void* r, const void* k, const void* v, const void* w, const float* u, const float* state,
                      float* checkpoints, const void* gy, const float* gfinal, void* gr, void* gk, void* gv, void* gw,
                      float* gu, float* gstate, int64_t sequences, int64_t tokens, int64_t heads, int64_t head_size,
                      const int64_t* cu_seqlens, int bfloat16, int level, int threads) {
    Arguments a{};
    a.r = r, a.k = k, a.v = v, a.w = w, a.u = u, a.state = state, a.checkpoints = checkpoints;
    a.gy = gy, a.gfinal = gfinal, a.gr = gr, a.gk = gk, a.gv = gv, a.gw = gw, a.gu = gu, a.gstate = gstate;
    a.sequences = sequences, a.tokens = tokens, a.heads = heads, a.head_size = head_size;
    a.cu_seqlens = cu_seqlens, a.bfloat16 = bfloat16 != 0, a.threads = threads;
    return kernel_for(level).backward(a) ? 0 : 1;
}
}
