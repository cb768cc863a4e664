// Sums over shards, the tile that each shard of a result starts from, and sums of parts. Rows may have any width: the
// last shard ends with the row.
#pragma once
#include "bone/arguments.cuh"
#include "common/vector.cuh"

constexpr int SHARD_THREADS = 128;

template <class E, int V>
__device__ __forceinline__ void add_to(float (&sum)[V], const E* p) {
    float x[V];
    load_vector<E, V>(x, p);
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

template <class E, int V>
__device__ void shard_sum_by(const BoneArguments& a) {
    each_column<V>(a, [&](index_t t, int j) {
        float sum[V] = {};
        const E* x = (const E*)a.x + t * a.width;
        #pragma unroll 8
        for (int c = j; c < a.width; c += a.rank) add_to<E, V>(sum, x + c);
        store_vector<E, V>((E*)a.total + t * a.rank + j, sum);
    });
}

template <class E, int V>
__device__ void tiled_by(const BoneArguments& a) {
    each_column<V>(a, [&](index_t t, int j) {
        float tile[V] = {};
        for (int group = 0; group < a.groups; group++)
            add_to<E, V>(tile, (const E*)a.tile + (group * a.tokens + t) * a.rank + j);
        E* row = (E*)a.tiled + t * a.width;
        #pragma unroll 4
        for (int c = j; c < a.width; c += a.rank) store_vector<E, V>(row + c, tile);
    });
}

// Takes 16 bytes at once if shards and rows are multiples of them, pairs if they are even, else single elements.
template <class E>
__device__ __forceinline__ int width_of(const BoneArguments& a) {
    if (a.rank % WIDEST<E> == 0 && a.width % WIDEST<E> == 0) return WIDEST<E>;
    return a.rank % 2 == 0 && a.width % 2 == 0 ? 2 : 1;
}
template <class E>
__device__ void shard_sum(const BoneArguments& a) {
    const int width = width_of<E>(a);
    if (width == 1)
        shard_sum_by<E, 1>(a);
    else if (width == 2)
        shard_sum_by<E, 2>(a);
    else
        shard_sum_by<E, WIDEST<E>>(a);
}
template <class E>
__device__ void tiled(const BoneArguments& a) {
    const int width = width_of<E>(a);
    if (width == 1)
        tiled_by<E, 1>(a);
    else if (width == 2)
        tiled_by<E, 2>(a);
    else
        tiled_by<E, WIDEST<E>>(a);
}

// total = the sum of `groups` parts of `count` float32 elements each.
template <class E>
__device__ void sum_parts(const BoneArguments& a) {
    const index_t step = (index_t)gridDim.x * SHARD_THREADS;
    for (index_t at = (index_t)blockIdx.x * SHARD_THREADS + threadIdx.x; at < a.count; at += step) {
        float sum = 0.f;
        #pragma unroll 8
        for (int group = 0; group < a.groups; group++) sum += a.parts[group * a.count + at];
        store((E*)a.total + at, sum);
    }
}
