// What the CPU kernel's C interface hands to the copy of the kernel that was compiled for this processor.
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

// One instruction set's copy of the kernel. Both return false where memory for work buffers is missing.
struct Kernel {
    bool (*forward)(const Arguments&);
    bool (*backward)(const Arguments&);
};

// Defined by wkv6_cpu.cpp, compiled once for each with WKV6_LEVEL set to the name.
#if defined(__x86_64__)
extern const Kernel kernel_avx512;
extern const Kernel kernel_avx2;
#endif
extern const Kernel kernel_portable;

}  // namespace wkv6
