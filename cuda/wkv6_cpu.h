// What the CPU kernel's C interface hands to the kernel.
#pragma once
#include <cstdint>

namespace wkv6 {

// Tensors are contiguous. r k v w y and their gradients: (tokens, heads, head_size), float or bfloat16; u, gu: (heads,
// head_size); states: (sequences, heads, head_size, head_size), rows the key dimension; checkpoints: (tokens / 64,
// heads, head_size, head_size). Null: state and gfinal and gy for zeros, checkpoints where no backward will follow.
struct Arguments {
    const void *r, *k, *v, *w;
    const float *u, *state;
    float* checkpoints;

    void* y;  // forward's results
    float* final_state;

    const void* gy;  // backward's inputs and results
    const float* gfinal;
    void *gr, *gk, *gv, *gw;
    float *gu, *gstate;

    int64_t sequences, tokens, heads, head_size;
    const int64_t* cu_seqlens;  // (sequences + 1) bounds of the sequences, or null: all of one length
    bool bfloat16;
    int threads;
};

// Defined by wkv6_cpu.cpp. Both return false where memory for work buffers is missing. The namespace tells one instruction
// set's library from another's in the same process.
namespace WKV6_LEVEL {
bool forward(const Arguments&);
bool backward(const Arguments&);
}  // namespace WKV6_LEVEL

}  // namespace wkv6
