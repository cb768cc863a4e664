// Shared by the kernels of the recurrences: finding a block's sequence, and defining a kernel.
#pragma once
#include "common/kernel.cuh"

// The tokens of one head that a block walks: a sequence or, if time is split, a group of it. Block g * heads + h works
// on head h of group g, in one dimension of the grid, because the others end at 65,535.
template <int SEGMENT>
struct SequenceOf {
    int length;          // of the tokens; negative if no group has the place
    index_t stride;      // elements from one token to the next
    index_t token;       // the first
    index_t elements;    // of its head
    index_t channels;    // of the head, in (sequences or groups, heads, head_size)
    index_t state;       // of the head, in (sequences or groups, heads, head_size, head_size)
    index_t checkpoint;  // of the first slot's head
    index_t checkpoint_stride;

    template <class Arguments>
    __device__ explicit SequenceOf(const Arguments& a) {
        const int h = blockIdx.x % a.heads, g = blockIdx.x / a.heads, N = a.head_size;
        int n = 0;
        for (int after = a.sequences; after - n > 1;) {
            const int middle = (n + after) / 2;
            (first_group(a, middle) <= g ? n : after) = middle;
        }
        const index_t start = a.bounds ? a.bounds[n] : (index_t)n * a.length;
        const int from = (g - first_group(a, n)) * a.group;
        length = whole_length(a, n) - from;
        if (a.group) length = from > 0 && length <= 0 ? -1 : min(length, a.group);
        stride = (index_t)a.heads * N;
        token = start + from;
        elements = token * stride + h * N;
        channels = (index_t)blockIdx.x * N;
        state = channels * N;
        // No two sequences share a slot: sequence n ends before slot (start + its length) / SEGMENT + n + 1.
        checkpoint_stride = stride * N;
        checkpoint = (start / SEGMENT + n + from / SEGMENT) * checkpoint_stride + (index_t)h * N * N;
    }

    template <class Arguments>
    static __device__ int whole_length(const Arguments& a, int n) {
        return a.bounds ? (int)(a.bounds[n + 1] - a.bounds[n]) : a.length;
    }

    // The place of a sequence's first group. As with slots, some places stay empty, so that nobody needs to count the
    // groups; a sequence without tokens has one place, which passes its state on.
    template <class Arguments>
    static __device__ int first_group(const Arguments& a, int n) {
        if (!a.group) return n;
        return a.bounds ? (int)(a.bounds[n] / a.group) + n : a.groups / a.sequences * n;
    }

    // The head's first element in a tensor (heads, head_size).
    template <class Arguments>
    __device__ int channel(const Arguments& a) const {
        return blockIdx.x % a.heads * a.head_size;
    }

    // The slot of the segment that token t is in.
    template <class Arguments>
    __device__ float* slot(const Arguments& a, int t) const {
        return a.checkpoints + checkpoint + t / SEGMENT * checkpoint_stride;
    }
};

// A recurrence's kernel, in the sense of common/kernel.cuh.
#define RECURRENCE_KERNEL(...) KERNEL(Arguments, __VA_ARGS__)
