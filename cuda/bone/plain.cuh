// The same affine form and its gradients for any rank up to MOST, and for float32: products by plain multiplications
// out of shared memory. products.cuh has the formulas.
#pragma once
#include "bone/arguments.cuh"
#include "common/tile.cuh"

constexpr int MOST = 64;
constexpr int PLAIN_THREADS = 256;
constexpr int PLAIN_TOKENS = 16;  // of a tile

struct PlainShared {
    float x[PLAIN_TOKENS][MOST], d[PLAIN_TOKENS][MOST];
    float bone[MOST][MOST + 1];  // padded, so that it can be written by columns
};

// A thread's share of a tile: channel i of every `step`th token.
struct Share {
    static constexpr int step = PLAIN_THREADS / MOST, count = PLAIN_TOKENS / step;
    const int i = threadIdx.x % MOST, first = threadIdx.x / MOST;
    __device__ int token(int m) const { return first + m * step; }
};

template <class E>
__device__ __forceinline__ float load_at(const void* p, index_t at) {
    return to_float(((const E*)p)[at]);
}

// A block has a tile of tokens and a group of the shards.
template <class E>
__device__ void plain_forward(const BoneArguments& a) {
    auto& shared = *(PlainShared*)dynamic_shared();
    const Share mine;
    const int group = blockIdx.x % a.groups, rank = a.rank, shards = a.width / rank;
    const index_t t0 = (index_t)(blockIdx.x / a.groups) * PLAIN_TOKENS;
    const int valid = (int)min((index_t)PLAIN_TOKENS, a.tokens - t0);
    const int first = (int)((index_t)group * shards / a.groups), last = (int)((index_t)(group + 1) * shards / a.groups);
    float sums[mine.count];
    #pragma unroll
    for (int m = 0; m < mine.count; m++) sums[m] = 0.f;
    for (int b = first; b < last; b++) {
        __syncthreads();  // nobody reads the previous shard any more
        for (int at = threadIdx.x; at < rank * rank; at += PLAIN_THREADS)
            shared.bone[at % rank][at / rank] = load_at<E>(a.bone, (index_t)b * rank * rank + at);
        #pragma unroll
        for (int m = 0; m < mine.count; m++) {
            const int t = mine.token(m);
            if (mine.i < rank && t < valid)
                shared.x[t][mine.i] = load_at<E>(a.x, (t0 + t) * a.width + b * rank + mine.i);
        }
        __syncthreads();
        if (mine.i >= rank) continue;
        float u[mine.count];
        #pragma unroll
        for (int m = 0; m < mine.count; m++) u[m] = 0.f;
        for (int j = 0; j < rank; j++) {
            const float factor = shared.bone[j][mine.i];
            #pragma unroll
            for (int m = 0; m < mine.count; m++) u[m] += factor * shared.x[mine.token(m)][j];
        }
        #pragma unroll
        for (int m = 0; m < mine.count; m++) {
            const int t = mine.token(m);
            if (t >= valid) continue;
            store((E*)a.z + (t0 + t) * a.width + b * rank + mine.i, shared.x[t][mine.i] + u[m]);
            sums[m] += u[m];
        }
    }
    #pragma unroll
    for (int m = 0; m < mine.count; m++)
        if (mine.i < rank && mine.token(m) < valid)
            store((E*)a.shift + (group * a.tokens + t0 + mine.token(m)) * rank + mine.i, sums[m]);
}

// A block has a shard and a strip of tokens; a thread has the rows and the columns of dB that equal its own modulo 16.
template <class E>
__device__ void plain_backward(const BoneArguments& a) {
    constexpr int SIDE = MOST / 16;
    auto& shared = *(PlainShared*)dynamic_shared();
    const Share mine;
    const int rank = a.rank, shards = a.width / rank, b = blockIdx.x % shards, strip = blockIdx.x / shards;
    const index_t begin = (index_t)strip * a.strip, end = min(begin + a.strip, a.tokens);
    const int i0 = threadIdx.x / 16, j0 = threadIdx.x % 16;
    float sums[SIDE][SIDE];
    #pragma unroll
    for (int m = 0; m < SIDE * SIDE; m++) sums[m / SIDE][m % SIDE] = 0.f;
    for (int at = threadIdx.x; at < rank * rank; at += PLAIN_THREADS)
        shared.bone[at / rank][at % rank] = load_at<E>(a.bone, (index_t)b * rank * rank + at);
    for (index_t t0 = begin; t0 < end; t0 += PLAIN_TOKENS) {
        float d[mine.count], u[mine.count];
        __syncthreads();  // nobody reads the previous tile any more
        #pragma unroll
        for (int m = 0; m < mine.count; m++) {
            const int t = mine.token(m);
            d[m] = u[m] = 0.f;
            if (mine.i >= rank) continue;
            const bool valid = t0 + t < end;
            const index_t at = (t0 + t) * a.width + b * rank + mine.i;
            if (valid) d[m] = load_at<E>(a.d, at);
            shared.d[t][mine.i] = valid ? d[m] + load_at<E>(a.g, (t0 + t) * rank + mine.i) : 0.f;
            shared.x[t][mine.i] = valid && a.x ? load_at<E>(a.x, at) : 0.f;
        }
        __syncthreads();
        for (int i = 0; i < rank && mine.i < rank; i++) {
            const float factor = shared.bone[i][mine.i];
            #pragma unroll
            for (int m = 0; m < mine.count; m++) u[m] += factor * shared.d[mine.token(m)][i];
        }
        #pragma unroll
        for (int m = 0; m < mine.count; m++)
            if (mine.i < rank && t0 + mine.token(m) < end)
                store((E*)a.dx + (t0 + mine.token(m)) * a.width + b * rank + mine.i, d[m] + u[m]);
        if (!a.x) continue;
        for (int t = 0; t < PLAIN_TOKENS; t++) {
            float left[SIDE], right[SIDE];
            #pragma unroll
            for (int m = 0; m < SIDE; m++) {
                left[m] = i0 + m * 16 < rank ? shared.d[t][i0 + m * 16] : 0.f;
                right[m] = j0 + m * 16 < rank ? shared.x[t][j0 + m * 16] : 0.f;
            }
            #pragma unroll
            for (int m = 0; m < SIDE * SIDE; m++) sums[m / SIDE][m % SIDE] += left[m / SIDE] * right[m % SIDE];
        }
    }
    if (!a.x) return;
    float* part = a.parts + ((index_t)strip * shards + b) * rank * rank;
    #pragma unroll
    for (int m = 0; m < SIDE * SIDE; m++) {
        const int i = i0 + m / SIDE * 16, j = j0 + m % SIDE * 16;
        if (i < rank && j < rank) part[i * rank + j] = sums[m / SIDE][m % SIDE];
    }
}
