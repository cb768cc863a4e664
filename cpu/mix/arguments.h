// What mix.cpp's C interface is told: a structure an operation, for both directions, which ops/mix/cpu.py mirrors field
// by field. Pointers whose type is void are to float or bfloat16; gradients carry the name of what they belong to.
#pragma once
#include <cstdint>

// See lerp.h for the shapes. Any of backward's results may be null; glow and gup need rank above 0.
struct LerpArguments {
    const void *x, *last, *maa, *low, *up;  // last, low and up may be null
    void* const* outs;                      // forward's results: n times (tokens, channels)
    const void* const* grads;               // backward's input, like outs, and results
    void *gx, *glast;
    float* gmaa;
    void* glow;
    float* gup;
    const int64_t* cu_seqlens;  // (sequences + 1) bounds of the sequences, or null: all of one length
    int64_t n, tokens, channels, rank, sequences;
    int bfloat16, threads;
};

// y, g, out and their gradients (tokens, heads * size); weight and bias and theirs (heads * size).
struct NormGateArguments {
    const void *y, *g, *weight, *bias;
    void* out;         // forward's result
    const void* grad;  // backward's input and results
    void *gy, *gg;
    float *gweight, *gbias;  // both null or neither
    int64_t tokens, heads, size;
    float eps;
    int bfloat16, threads;
};

// All (count).
struct SigmoidGateArguments {
    const void *r, *v;
    void* out;
    const void* grad;
    void *gr, *gv;
    int64_t count;
    int bfloat16, threads;
};

// All (count).
struct ReluSquareArguments {
    const void* x;
    void* out;
    const void* grad;
    void* gx;
    int64_t count;
    int bfloat16, threads;
};
