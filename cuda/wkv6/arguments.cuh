// The arguments of wkv6's kernels.
#pragma once
#include "common/recurrence.cuh"

// Tokens between two checkpoints: the states that forward keeps so that backward need not start at token 0.
constexpr int SEGMENT = 64;

// One structure for both directions; ops/recurrence/kernels.py mirrors it field by field. Tensors are contiguous;
// "elements" are bf16, 16-byte aligned; a null pointer marks a tensor that the caller does not have or want.
struct Arguments {
    const void *r, *k, *v, *w;  // elements (tokens, heads, head_size)
    const float* u;             // (heads, head_size)
    const float* state;         // (sequences, heads, K, V), or null for zeros
    const index_t* bounds;      // (sequences + 1): sequence n is tokens bounds[n] to bounds[n + 1]; or null if
                                // each sequence is `length` tokens
    void* y;                    // elements (tokens, heads, head_size)
    float* final_state;         // (sequences, heads, K, V)
    float* checkpoints;   // (tokens / SEGMENT + sequences, heads, K, V) in the form of chunk.cuh's Checkpoint; null in
                          // a forward without backward
    const void* gy;       // gradients: gy is that of y
    const float* gfinal;  // or null for zeros
    void *gr, *gk, *gv, *gw;
    float* gu;           // (sequences or groups, heads, head_size): to be summed over the first
    float* gstate;       // or null
    float* parts;        // if time is split: (groups, heads, K, V), states at the groups' bounds; then like gstate
    float* transitions;  // and (groups, heads, K), the scale of a state from a group's start to its end
    int sequences, length, heads, head_size;
    int group, groups;  // a group's tokens, a multiple of 64, or 0; and the groups' places, or the sequences
};

using Sequence = SequenceOf<SEGMENT>;
