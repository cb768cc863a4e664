// What a launch is told, and how a block finds its sequence.
#pragma once
#include "common/device.cuh"

enum Scalar { FLOAT32 = 0, BFLOAT16 = 1 };

// Tokens between two checkpoints: the states that forward keeps so that backward need not start at token 0.
constexpr int SEGMENT = 64;

// One structure for both directions; ops/wkv6/cuda.py mirrors it field by field. Tensors are contiguous; "elements" are
// float32 or bf16 as `scalar` says, 16-byte aligned; a null pointer marks what the caller does not have or want.
struct Arguments {
    const void *r, *k, *v, *w;  // elements (tokens, heads, head_size)
    const float* u;             // (heads, head_size)
    const float* state;         // (sequences, heads, K, V), or null for zeros
    const index_t* bounds;      // (sequences + 1): sequence n is tokens bounds[n] to bounds[n + 1]; or null where
                                // each sequence is `length` tokens
    void* y;                    // elements (tokens, heads, head_size)
    float* final_state;         // (sequences, heads, K, V)
    float* checkpoints;         // (tokens / SEGMENT + sequences, heads, K, V); null in a forward without backward
    const void* gy;             // gradients, named after what they belong to
    const float* gfinal;        // or null for zeros
    void *gr, *gk, *gv, *gw;
    float* gu;      // (sequences, heads, head_size): to be summed over the sequences
    float* gstate;  // or null
    int sequences, length, heads, head_size, scalar, device;  // device: the GPU that holds all of it
};

// Block n * heads + h works on head h of sequence n: one dimension of the grid, since the others end at 65,535.
struct Sequence {
    int length;
    int bonus;           // the head's first element in u
    index_t stride;      // elements from one token to the next
    index_t elements;    // of the first token's head
    index_t channels;    // of the head, in (sequences, heads, head_size)
    index_t state;       // of the head, in (sequences, heads, K, V)
    index_t checkpoint;  // of the first checkpoint's head
    index_t checkpoint_stride;

    __device__ explicit Sequence(const Arguments& a) {
        const int h = blockIdx.x % a.heads, n = blockIdx.x / a.heads, N = a.head_size;
        const index_t first = a.bounds ? a.bounds[n] : (index_t)n * a.length;
        length = a.bounds ? (int)(a.bounds[n + 1] - first) : a.length;
        bonus = h * N;
        stride = (index_t)a.heads * N;
        elements = first * stride + h * N;
        channels = n * stride + h * N;
        state = channels * N;
        // No two sequences share a slot: sequence n ends before slot (first + length) / SEGMENT + n + 1.
        checkpoint_stride = stride * N;
        checkpoint = (first / SEGMENT + n) * checkpoint_stride + (index_t)h * N * N;
    }
};
