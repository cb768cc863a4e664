// The arguments of decode.cpp's C interface; ops/decode/__init__.py mirrors them field by field.
#pragma once
#include <cstdint>

// y = x Wᵀ for a few rows x; see dense.h and blocks.h.
struct ProductArguments {
    const void* x;  // (rows, in_features), float or bfloat16
    const void* w;  // (out_features, in_features) of the type of x, or the blocks of blocks.h
    void* y;        // (rows, out_features), like x
    int64_t rows, in_features, out_features;
    int bits;  // of a block's weights: 8 or 4; 0 for a plain matrix
    int bfloat16, threads;
};

// x += add, unless that is null, then y = LayerNorm(x); x, add, y (rows, channels), weight and bias (channels).
struct NormArguments {
    void* x;
    const void *add, *weight, *bias;
    void* y;
    int64_t rows, channels;
    float eps;
    int bfloat16, threads;
};

// x (rows, channels) = f(x + bias) in place; bias (channels) or null. kind: 0 f(x) = x, 1 tanh, 2 sigmoid.
struct ElementArguments {
    void* x;
    const void* bias;
    int64_t rows, channels;
    int kind, bfloat16, threads;
};

// A C function of any family and its arguments. A checked one returns an int, 0 for success; others return nothing.
struct Call {
    void* function;
    const void* arguments;
    int64_t checked;
};
