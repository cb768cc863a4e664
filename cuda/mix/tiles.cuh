// What the mix kernels on tensor cores share: a block has a group of channels, which it takes in steps, of a tile of
// tokens, 16 of which are a warp's; what it gives of a group's channels is a part, to be added up.
#pragma once
#include "common/tile.cuh"
#include "mix/arguments.cuh"

constexpr int TILE_TOKENS = 64;

__device__ __forceinline__ const bf16* element(const void* p, index_t at) { return (const bf16*)p + at; }

// A block's group and tile; a tile has `own` tokens that the next one has not.
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
