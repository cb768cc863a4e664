// The arguments of wkv6.cpp's C interface.
#pragma once
#include <cstdint>

// For both directions; ops/recurrence/kernels.py mirrors it field by field. Tensors are contiguous. r k v w y and
// their gradients: (tokens, heads, head_size), float or bfloat16; u, gu: (heads, head_size); states: (sequences, heads,
// head_size, head_size), rows the key dimension; checkpoints: (tokens / 64, heads, head_size, head_size). Null: state,
// gy and gfinal for zeros, checkpoints if no backward will follow.
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

    const int64_t* cu_seqlens;  // (sequences + 1) bounds of the sequences, or null: all of one length
    int64_t sequences, tokens, heads, head_size;
    int bfloat16, threads;
};
