// What a launch is told, and how a block finds its sequence.
#pragma once
#include "common/device.cuh"

enum Scalar { FLOAT32 = 0, BFLOAT16 = 1 };

// Tokens that share a slot among the checkpoints, the states that forward keeps so that backward need not start at
// token 0: in float32 the state before the first of them, or in bf16 the states before the first and the 17th.
constexpr int SEGMENT = 32;

// -e^(-1/2): a decay's logarithm is this times sigmoid(w), so that no decay is below 0.545.
constexpr float DECAY_RATE = -0.60653065971263342f;

// One structure for both directions; ops/wkv7/cuda.py mirrors it field by field. Tensors are contiguous; "elements" are
// float32 or bf16 as `scalar` says, 16-byte aligned; states have the value dimension in rows; a null pointer marks what
// the caller does not have or want.
struct Arguments {
    const void *r, *w, *k, *v, *a, *b;  // elements (tokens, heads, head_size)
    const float* state;                 // (sequences, heads, V, K), or null for zeros
    const index_t* bounds;              // (sequences + 1): sequence n is tokens bounds[n] to bounds[n + 1]; or null
                                        // where each sequence is `length` tokens
    void* y;                            // elements (tokens, heads, head_size)
    float* final_state;                 // (sequences, heads, V, K)
    float* checkpoints;                 // (tokens / SEGMENT + sequences, heads, V, K); null without backward
    const void* gy;                     // gradients, named after what they belong to
    const float* gfinal;                // or null for zeros
    void *gr, *gw, *gk, *gv, *ga, *gb;
    float* gstate;                                            // or null
    int sequences, length, heads, head_size, scalar, device;  // device: the GPU that holds all of it
};

// Block n * heads + h works on head h of sequence n: one dimension of the grid, since the others end at 65,535.
struct Sequence {
    int length;
    index_t stride;      // elements from one token to the next
    index_t elements;    // of the first token's head
    index_t state;       // of the head, in (sequences, heads, V, K)
    index_t checkpoint;  // of the first slot's head
    index_t checkpoint_stride;

    __device__ explicit Sequence(const Arguments& a) {
        const int h = blockIdx.x % a.heads, n = blockIdx.x / a.heads, N = a.head_size;
        const index_t first = a.bounds ? a.bounds[n] : (index_t)n * a.length;
        length = a.bounds ? (int)(a.bounds[n + 1] - first) : a.length;
        stride = (index_t)a.heads * N;
        elements = first * stride + h * N;
        state = (n * stride + h * N) * N;
        // No two sequences share a slot: sequence n ends before slot (first + length) / SEGMENT + n + 1.
        checkpoint_stride = stride * N;
        checkpoint = (first / SEGMENT + n) * checkpoint_stride + (index_t)h * N * N;
    }

    // The slot of the segment that token t is in.
    __device__ float* slot(const Arguments& a, int t) const {
        return a.checkpoints + checkpoint + t / SEGMENT * checkpoint_stride;
    }

    // The half of a slot that holds, in bf16, the state before token t, a multiple of 16.
    __device__ bf16* chunk_state(const Arguments& a, int t) const {
        return (bf16*)slot(a, t) + t % SEGMENT / 16 * a.head_size * a.head_size;
    }
};
