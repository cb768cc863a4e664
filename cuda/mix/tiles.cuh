// Shared by the mix kernels on tensor cores: a block has a tile of tokens, 16 of which are a warp's, and a group of
// channels, which it takes in steps; its sums over the group's channels are parts, to be added up.
#pragma once
#include "common/tile.cuh"
#include "mix/arguments.cuh"

constexpr int TILE_TOKENS = 64;

__device__ __forceinline__ const bf16* element(const void* p, index_t at) { return (const bf16*)p + at; }

// A block's group and tile; `own` tokens of a tile are not in the next one.
struct TilePart {
    int group, begin, end, valid, t0;

    __device__ TilePart(const MixArguments& a, int own) : TilePart(a, own, blockIdx.x) {}
    __device__ TilePart(const MixArguments& a, int own, unsigned block, int most = TILE_TOKENS) {
        const int groups = (a.channels + a.size - 1) / a.size;
        group = block % groups, begin = group * a.size, end = min(begin + a.size, a.channels);
        t0 = (int)(block / groups) * own;
        valid = (int)min((index_t)most, a.tokens - t0);
    }
};
