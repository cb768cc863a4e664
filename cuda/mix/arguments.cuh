// The arguments of mix's kernels, and a block's part of the work.
#pragma once
#include "common/device.cuh"

// One structure for all kernels; ops/mix/cuda.py mirrors it field by field, and gives the order of an operation's
// tensors. Elements are bf16; tensors are (tokens, channels) and contiguous, aligned to two elements; a null pointer
// marks a tensor that the caller does not have or want.
struct MixArguments {
    const void* inputs[8];
    void* outputs[6];
    const void* parameters[4];  // (channels) each
    float* sums[6];             // (strips, channels): sums over a strip's tokens, to be added up
    const index_t* bounds;      // lerp: sequence n is tokens bounds[n] to bounds[n + 1]; null: each is `length` tokens
    const void* last;           // lerp: (sequences, channels), the tokens before the sequences, or null for zeros
    void* glast;
    index_t tokens;
    int channels, size;  // size: channels of a group, which one warp has of a token; even, at most 128
    int strip;           // tokens of a block
    int n;               // lerp: the number of points, or of their gradients
    int length, sequences;
    float eps;
};

constexpr int WARPS = 4;        // of a block; they take a strip's tokens in turn
constexpr int MOST_SIZE = 128;  // four channels a lane
