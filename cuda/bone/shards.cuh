// Sums over shards, the tile that each shard of a result starts from, and sums of parts. Rows may have any width: the
// last shard ends with the row.
#pragma once
#include "bone/arguments.cuh"
#include "common/vector.cuh"

constexpr int SHARD_THREADS = 128;

template <int V>
__device__ __forceinline__ void add_to(float (&sum)[V], const bf16* p) {
    float x[V];
    load_vector<V>(x, p);
    #pragma unroll
    for (int e = 0; e < V; e++) sum[e] += x[e];
}

// f(t, j) for each token t and each V neighbours j, j + 1, … of a shard.
template <int V, class F>
__device__ __forceinline__ void each_column(const BoneArguments& a, F f) {
    const int columns = a.rank / V;
    const index_t step = (index_t)gridDim.x * SHARD_THREADS;
    for (index_t at = (index_t)blockIdx.x * SHARD_THREADS + threadIdx.x; at < a.tokens * columns; at += step)
        f(at / columns, (int)(at % columns) * V);
}

template <int V>
__device__ void shard_sum_by(const BoneArguments& a) {
    each_column<V>(a, [&](index_t t, int j) {
        float sum[V] = {};
        const bf16* x = (const bf16*)a.x + t * a.width;
        #pragma unroll 8
        for (int c = j; c < a.width; c += a.rank) add_to<V>(sum, x + c);
        store_vector<V>((bf16*)a.total + t * a.rank + j, sum);
    });
}

template <int V>
__device__ void tiled_by(const BoneArguments& a) {
    each_column<V>(a, [&](index_t t, int j) {
        float tile[V] = {};
        for (int group = 0; group < a.groups; group++)
            add_to<V>(tile, (const bf16*)a.tile + (group * a.tokens + t) * a.rank + j);
        bf16* row = (bf16*)a.tiled + t * a.width;
        #pragma unroll 4
        for (int c = j; c < a.width; c += a.rank) store_vector<V>(row + c, tile);
    });
}

// Takes 16 bytes at once if shards and rows are multiples of them, pairs if they are even, else single elements.
__device__ __forceinline__ int width_of(const BoneArguments& a) {
    if (a.rank % WIDEST == 0 && a.width % WIDEST == 0) return WIDEST;
    return a.rank % 2 == 0 && a.width % 2 == 0 ? 2 : 1;
}
__device__ void shard_sum(const BoneArguments& a) {
    const int width = width_of(a);
    if (width == 1)
        shard_sum_by<1>(a);
    else if (width == 2)
        shard_sum_by<2>(a);
    else
        shard_sum_by<WIDEST>(a);
}
__device__ void tiled(const BoneArguments& a) {
    const int width = width_of(a);
    if (width == 1)
        tiled_by<1>(a);
    else if (width == 2)
        tiled_by<2>(a);
    else
        tiled_by<WIDEST>(a);
}

// total = the sum of `groups` parts of `count` float32 elements each.
__device__ void sum_parts(const BoneArguments& a) {
    const index_t step = (index_t)gridDim.x * SHARD_THREADS;
    for (index_t at = (index_t)blockIdx.x * SHARD_THREADS + threadIdx.x; at < a.count; at += step) {
        float sum = 0.f;
        #pragma unroll 8
        for (int group = 0; group < a.groups; group++) sum += a.parts[group * a.count + at];
        store((bf16*)a.total + at, sum);
    }
}
