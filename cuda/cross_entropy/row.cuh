// A block takes a row of logits: its loss, log sum exp(logits) - logits[target], and its gradient, which overwrites the
// logits. The row is read from memory once: one pass finds the sum and the largest logit (Milakov and Gimelshein 2018,
// arXiv 1805.02867), and the pass that writes the gradient finds the row in the cache.
#pragma once
#include "common/vector.cuh"
#include "cross_entropy/arguments.cuh"

constexpr int ROW_THREADS = 512;
constexpr float LOWEST = -3.402823466e38f;  // no finite logit is below it

// The largest of some logits, its first place, and the sum of exp(logit - largest).
struct Softmax {
    float largest, sum;
    index_t where;
};

__device__ __forceinline__ Softmax merged(const Softmax& a, const Softmax& b) {
    const bool first = a.largest > b.largest || (a.largest == b.largest && a.where <= b.where);
    const Softmax &high = first ? a : b, &low = first ? b : a;
    return Softmax{high.largest, high.sum + low.sum * expf(low.largest - high.largest), high.where};
}

template <int V>
__device__ __forceinline__ Softmax softmax_of(const bf16* x, index_t vocabulary) {
    Softmax mine{LOWEST, 0.f, vocabulary};
    #pragma unroll 2
    for (index_t at = threadIdx.x * V; at < vocabulary; at += ROW_THREADS * V) {
        float v[V];
        load_vector<V>(v, x + at);
        float largest = mine.largest;
        #pragma unroll
        for (int e = 0; e < V; e++)
            if (v[e] > largest) largest = v[e], mine.where = at + e;
        mine.sum *= expf(mine.largest - largest);
        #pragma unroll
        for (int e = 0; e < V; e++) mine.sum += expf(v[e] - largest);
        mine.largest = largest;
    }
    __shared__ Softmax shared[ROW_THREADS];
    shared[threadIdx.x] = mine;
    __syncthreads();
    for (int step = ROW_THREADS / 2; step > 0; step /= 2) {
        if ((int)threadIdx.x < step) shared[threadIdx.x] = merged(shared[threadIdx.x], shared[threadIdx.x + step]);
        __syncthreads();
    }
    return shared[0];
}

template <int V>
__device__ void row_by(const CrossEntropyArguments& a) {
    const index_t row = blockIdx.x, target = a.targets[row];
    const bf16* x = (const bf16*)a.logits + row * a.vocabulary;
    bf16* gradient = (bf16*)a.gradient + row * a.vocabulary;
    const Softmax all = softmax_of<V>(x, a.vocabulary);
    const bool known = 0 <= target && target < a.vocabulary;
    const float at_target = known ? to_float(x[target]) : 0.f;
    __syncthreads();  // the target's logit is read before it is written over
    if (threadIdx.x == 0)
        a.losses[row] = known ? logf(all.sum) + (all.largest - at_target) : __uint_as_float(0x7fc00000);
    if (!a.gradient) return;
    const float factor = a.scale / all.sum;
    #pragma unroll 2
    for (index_t at = threadIdx.x * V; at < a.vocabulary; at += ROW_THREADS * V) {
        float v[V];
        load_vector<V>(v, x + at);
        #pragma unroll
        for (int e = 0; e < V; e++) {
            v[e] = expf(v[e] - all.largest) * factor;
            if (at + e == target) v[e] -= a.scale;
            if (at + e == all.where) v[e] += a.scale * a.pull * all.largest;
        }
        store_vector<V>(gradient + at, v);
    }
}

__device__ void row(const CrossEntropyArguments& a) {
    if (a.vocabulary % WIDEST == 0)
        row_by<WIDEST>(a);
    else
        row_by<1>(a);
}
