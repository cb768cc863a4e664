// The arguments of wkv7.cpp's C interface.
#pragma once
#include <cstdint>

// For both directions; ops/recurrence/kernels.py mirrors it field by field. Tensors are contiguous. r w k v a b y
// and their gradients: (tokens, heads, head_size), float or bfloat16; states: (sequences, heads, head_size, head_size),
// rows the value dimension; checkpoints: (tokens / 64, heads, head_size, head_size), rows the key dimension. Null:
// state, gy and gfinal for zeros, checkpoints if no backward will follow.
struct Arguments {
    const void *r, *w, *k, *v, *a, *b;
    const float* state;
    float* checkpoints;

    void* y;  // forward's results
    float* final_state;

    const void* gy;  // backward's inputs and results
    const float* gfinal;
    void *gr, *gw, *gk, *gv, *ga, *gb;
    float* gstate;

    const int64_t* cu_seqlens;  // (sequences + 1) bounds of the sequences, or null: all of one length
    int64_t sequences, tokens, heads, head_size;
    int bfloat16, threads;
};
