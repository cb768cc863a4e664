// What an adapter before a norm leaves to it: `parts` tensors (tokens, shard), whose sum is added to each shard of a
// row, channels b shard to (b + 1) shard; and its gradient, the sum over shards of the row's. Of points it is the other
// way round: their sums over shards are given, whose gradients are added to theirs. A shard is a power of 2, 16 to 128,
// so that all channels of a thread are at the same places of their shards.
#pragma once
#include "common/vector.cuh"
#include "mix/rows.cuh"

constexpr int MOST_SHARD = 128;
constexpr int LEFTS = 3;  // of x, y and gate, or of as many points

// x, channels c, c + 1, … of a token, and to each shard row t of `low` (rows, shard), or nothing where that is null.
template <class E, int V>
__device__ __forceinline__ void add_low(const MixArguments& a, const void* low, index_t t, int c, float (&x)[V]) {
    if (!low) return;
    float more[V];
    load_vector<E, V>(more, (const E*)low + t * a.shard + (c & (a.shard - 1)));
    #pragma unroll
    for (int e = 0; e < V; e++) x[e] += more[e];
}
// The same of what was left.
template <class E, int V>
__device__ __forceinline__ void add_left(const MixArguments& a, const void* left, index_t t, int c, float (&x)[V]) {
    if (!left) return;
    #pragma unroll 2  // not more, which take registers that a third block needs
    for (int part = 0; part < a.parts; part++) add_low<E, V>(a, left, part * a.tokens + t, c, x);
}

// Sums over what a thread has of a row's shards.
template <int V>
struct ShardSums {
    float x[LEFTS][V] = {};
    __device__ __forceinline__ void add(int i, const float (&of_row)[V]) {
        #pragma unroll
        for (int e = 0; e < V; e++) x[i][e] += of_row[e];
    }
    // The same for an i that the compiler does not know, without which the sums would not be registers.
    __device__ __forceinline__ void add_to(int i, const float (&of_row)[V]) {
        #pragma unroll
        for (int known = 0; known < LEFTS; known++)
            if (known == i) add(known, of_row);
    }
};

// outputs `first` to first + LEFTS - 1, each (tokens, shard) or null: token t's sums over shards, of those of a block's
// WARPS_OF_ROW warps. room: that many times LEFTS MOST_SHARD floats.
template <class E, int V, int WARPS_OF_ROW>
__device__ void store_shard_sums(const MixArguments& a, int first, index_t t, ShardSums<V>& sums, float* room) {
    if (!a.outputs[first] && !a.outputs[first + 1] && !a.outputs[first + 2]) return;
    const int own = min(a.shard, 32 * V), all = WARPS_OF_ROW * own;  // places that a warp has, and those of a sum
    const int at = lane_id() * V, warp = threadIdx.x / 32;
    __syncthreads();  // nobody reads what was in the room any more
    #pragma unroll
    for (int i = 0; i < LEFTS; i++) {
        if (!a.outputs[first + i]) continue;
        for (int mask = 16; mask * V >= a.shard; mask /= 2)  // lanes at the same places
            #pragma unroll
            for (int e = 0; e < V; e++) sums.x[i][e] += __shfl_xor_sync(0xffffffffu, sums.x[i][e], mask);
        if (at < own)
            #pragma unroll
            for (int e = 0; e < V; e++) room[i * all + warp * own + at + e] = sums.x[i][e];
    }
    __syncthreads();
    for (int j = threadIdx.x; j < LEFTS * a.shard; j += WARPS_OF_ROW * 32) {
        const int i = j / a.shard, place = j & (a.shard - 1);
        if (!a.outputs[first + i]) continue;
        float sum = 0.f;
        for (int from = place; from < all; from += a.shard) sum += room[i * all + from];
        store((E*)a.outputs[first + i] + t * a.shard + place, sum);
    }
    __syncthreads();  // the room is read
}
