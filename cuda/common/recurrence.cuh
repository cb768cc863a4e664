// What the kernels of the recurrences have in common: how a block finds its sequence, and how a kernel is made known.
#pragma once
#include "common/device.cuh"

// Block n * heads + h works on head h of sequence n: one dimension of the grid, since the others end at 65,535.
template <int SEGMENT>
struct SequenceOf {
    int length;
    index_t stride;      // elements from one token to the next
    index_t elements;    // of the first token's head
    index_t channels;    // of the head, in (sequences, heads, head_size)
    index_t state;       // of the head, in (sequences, heads, head_size, head_size)
    index_t checkpoint;  // of the first slot's head
    index_t checkpoint_stride;

    template <class Arguments>
    __device__ explicit SequenceOf(const Arguments& a) {
        const int h = blockIdx.x % a.heads, n = blockIdx.x / a.heads, N = a.head_size;
        const index_t first = a.bounds ? a.bounds[n] : (index_t)n * a.length;
        length = a.bounds ? (int)(a.bounds[n + 1] - first) : a.length;
        stride = (index_t)a.heads * N;
        elements = first * stride + h * N;
        channels = n * stride + h * N;
        state = channels * N;
        // No two sequences share a slot: sequence n ends before slot (first + length) / SEGMENT + n + 1.
        checkpoint_stride = stride * N;
        checkpoint = (first / SEGMENT + n) * checkpoint_stride + (index_t)h * N * N;
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

// What a block may ask for on every GPU since Ampere.
constexpr int MOST_SHARED = 99 * 1024;

// A kernel: its name, its code, its threads a block, the blocks that should fit a multiprocessor's registers, and its
// bytes of dynamic shared memory; with NAME_run(arguments, blocks, x, y, stream), which enqueues it over blocks of (x,
// y) threads and returns CUDA's error code, 0 for success, or, in a module, those bytes as NAME_shared.
#define RECURRENCE_KERNEL(name, code, threads, blocks, shared)                                         \
    static_assert(shared <= MOST_SHARED, #name " needs too much shared memory");                       \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Arguments a) { code(a); } \
    RECURRENCE_RUN(name, shared)
#ifdef __CUDACC_RTC__
#define RECURRENCE_RUN(name, shared) extern "C" __constant__ int name##_shared = shared;
#else
#define RECURRENCE_RUN(name, shared)                                                        \
    extern "C" int name##_run(const Arguments* a, int blocks, int x, int y, void* stream) { \
        return launch(name, dim3(blocks), dim3(x, y), shared, stream, *a);                  \
    }
#endif
