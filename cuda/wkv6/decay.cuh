// What comes before the recurrence in RWKV-6's block, for the forward kernel that makes it where it is used: the decay,
// a parameter and a product of low rank R. For the tokens of a head,
//     w = decay + low up,    low (tokens, R), up (R, N)
// in float32, rounded once. A warp makes the chunk's 16 channels that it also has of up, in registers.
#pragma once
#include "common/fetch.cuh"
#include "wkv6/chunk.cuh"

// The decay's share of a block's shared memory: low of two chunks, of the next one and of that after it.
template <int R>
struct DecayShared {
    typename Shape<R>::Rows low[2];
};
template <>
struct DecayShared<0> {};

// A warp's 16 channels of up and of the parameter.
template <int N, int R>
struct DecayFactors {
    Right up[R / 16];
    uint32_t decay[2];  // neighbours, as a tile's columns are

    // The channels from c0, up's in shared memory.
    __device__ __forceinline__ DecayFactors(const bf16 (*rows)[N + PADDING], const bf16* parameter, int c0) {
        #pragma unroll
        for (int i = 0; i < R / 16; i++) up[i] = load_right_transposed(&rows[i * 16][c0], N + PADDING);
        #pragma unroll
        for (int half = 0; half < 2; half++)
            decay[half] = *(const uint32_t*)&parameter[c0 + tile_column(lane_id(), half * 4)];
    }

    // Step `i` of the R / 16 that add up to a chunk's product, (t, c).
    __device__ __forceinline__ void step(Accumulator& product, const typename Shape<R>::Rows& low, int i) const {
        multiply(product, load_tile(&low[0][i * 16], Shape<R>::stride), up[i]);
    }

    // w, of the whole product.
    __device__ __forceinline__ Tile added(Accumulator product) const {
        #pragma unroll
        for (int e = 0; e < 8; e++) product.c[e] += e & 1 ? high_half(decay[e / 4]) : low_half(decay[e / 4]);
        return rounded(product);
    }
};
template <int N>
struct DecayFactors<N, 0> {};
