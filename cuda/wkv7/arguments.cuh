// The arguments of wkv7's kernels.
#pragma once
#include "common/recurrence.cuh"

// Tokens that share a slot among the checkpoints, the states that forward keeps so that backward need not start at
// token 0: in bf16, the states before the first of them and before the 17th.
constexpr int SEGMENT = 32;

// -e^(-1/2): a decay's logarithm is this times sigmoid(w), so that no decay is below 0.545.
constexpr float DECAY_RATE = -0.60653065971263342f;

// One structure for both directions; ops/recurrence/kernels.py mirrors it field by field. Tensors are contiguous;
// "elements" are bf16, 16-byte aligned; states have the value dimension in rows; a null pointer marks a tensor that the
// caller does not have or want.
struct Arguments {
    const void *r, *w, *k, *v, *a, *b;  // elements (tokens, heads, head_size)
    const float* state;                 // (sequences, heads, V, K), or null for zeros
    const index_t* bounds;              // (sequences + 1): sequence n is tokens bounds[n] to bounds[n + 1]; or null
                                        // if each sequence is `length` tokens
    void* y;                            // elements (tokens, heads, head_size)
    float* final_state;                 // (sequences, heads, V, K)
    float* checkpoints;                 // (tokens / SEGMENT + sequences, heads, V, K); null without backward
    const void* gy;                     // gradients: gy is that of y
    const float* gfinal;                // or null for zeros
    void *gr, *gw, *gk, *gv, *ga, *gb;
    float* gstate;       // or null
    float* parts;        // if time is split: (groups, heads, V, K), states at the groups' bounds
    float* transitions;  // and (groups, heads, K, K), the map of a state from a group's start to its end
    int sequences, length, heads, head_size;
    int group, groups;  // a group's tokens, a multiple of 64, or 0; and the groups' places, or the sequences
};

using Sequence = SequenceOf<SEGMENT>;

// The half of a slot that holds, in bf16, the state before token t, a multiple of 16.
__device__ inline bf16* chunk_state(const Arguments& a, const Sequence& s, int t) {
    return (bf16*)s.slot(a, t) + t % SEGMENT / 16 * a.head_size * a.head_size;
}
