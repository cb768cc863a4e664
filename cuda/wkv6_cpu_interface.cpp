// The CPU kernel's C interface.
#include "wkv6_cpu.h"

using wkv6::Arguments;

extern "C" {

// Both return 0, or 1 where memory is missing.
int wkv6_cpu_forward(const void* r, const void* k, const void* v, const void* w, const float* u, const float* state,
                     void* y, float* final_state, float* checkpoints, int64_t sequences, int64_t tokens,
                     int64_t heads, int64_t head_size, const int64_t* cu_seqlens, int bfloat16, int threads) {
    Arguments a{};
    a.r = r, a.k = k, a.v = v, a.w = w, a.u = u, a.state = state, a.checkpoints = checkpoints;
    a.y = y, a.final_state = final_state;
    a.sequences = sequences, a.tokens = tokens, a.heads = heads, a.head_size = head_size;
    a.cu_seqlens = cu_seqlens, a.bfloat16 = bfloat16 != 0, a.threads = threads;
    return wkv6::WKV6_LEVEL::forward(a) ? 0 : 1;
}

int wkv6_cpu_backward(const void* r, const void* k, const void* v, const void* w, const float* u, const float* state,
                      float* checkpoints, const void* gy, const float* gfinal, void* gr, void* gk, void* gv, void* gw,
                      float* gu, float* gstate, int64_t sequences, int64_t tokens, int64_t heads, int64_t head_size,
                      const int64_t* cu_seqlens, int bfloat16, int threads) {
    Arguments a{};
    a.r = r, a.k = k, a.v = v, a.w = w, a.u = u, a.state = state, a.checkpoints = checkpoints;
    a.gy = gy, a.gfinal = gfinal, a.gr = gr, a.gk = gk, a.gv = gv, a.gw = gw, a.gu = gu, a.gstate = gstate;
    a.sequences = sequences, a.tokens = tokens, a.heads = heads, a.head_size = head_size;
    a.cu_seqlens = cu_seqlens, a.bfloat16 = bfloat16 != 0, a.threads = threads;
    return wkv6::WKV6_LEVEL::backward(a) ? 0 : 1;
}
}
