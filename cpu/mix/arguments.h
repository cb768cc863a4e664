// The arguments of mix.cpp's C interface: a structure for each operation and both its directions, which ops/mix/cpu.py
// mirrors field by field. void pointers are to float or bfloat16; gx is the gradient of x.
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

// y, g, out and their gradients (tokens, channels); weight and bias and theirs (channels).
struct NormGateArguments {
    const void *y, *g, *weight, *bias;
    void* out;         // forward's result
    const void* grad;  // backward's input and results
    void *gy, *gg;
    float *gweight, *gbias;  // both null or neither
    int64_t tokens, channels, size;
    float eps;
    int bfloat16, threads;
};

// All (tokens, channels).
struct SigmoidGateArguments {
    const void *r, *v;
    void* out;
    const void* grad;
    void *gr, *gv;
    int64_t tokens, channels;
    int bfloat16, threads;
};

// All (tokens, channels).
struct ReluSquareArguments {
    const void* x;
    void* out;         // forward's result, backward's input
    const void* grad;  // backward's other input and result
    void* gx;
    int64_t tokens, channels;
    int bfloat16, threads;
};

// See delta_keys.h. k, low, key, a, b and their gradients (tokens, channels); a0, k_k, k_a and theirs (heads *
// size).
struct DeltaKeysArguments {
    const void *k, *low, *a0, *k_k, *k_a;
    void *key, *a, *b;           // forward's results
    const void *gkey, *ga, *gb;  // backward's inputs and results
    void *gk, *glow;
    float *ga0, *gk_k, *gk_a;  // all null or none
    int64_t tokens, channels, size;
    int bfloat16, threads;
};

// v, first, low, out and their gradients (tokens, channels); v0 and its (channels).
struct ValueResidualArguments {
    const void *v, *first, *low, *v0;
    void* out;         // forward's result
    const void* grad;  // backward's input and results
    void *gv, *gfirst, *glow;
    float* gv0;  // may be null
    int64_t tokens, channels;
    int bfloat16, threads;
};

// y, r, k, v, g, out and their gradients (tokens, channels); r_k, weight, bias and theirs (channels).
struct NormBonusGateArguments {
    const void *y, *r, *k, *v, *g, *r_k, *weight, *bias;
    void* out;         // forward's result
    const void* grad;  // backward's input and results
    void *gy, *gr, *gk, *gv, *gg;
    float *gr_k, *gweight, *gbias;  // all null or none
    int64_t tokens, channels, size;
    float eps;
    int bfloat16, threads;
};
