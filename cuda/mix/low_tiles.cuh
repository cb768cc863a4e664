// Tiles of tokens and channels for the kernels of low_rank.cuh.
#pragma once
#include "common/fetch.cuh"
#include "mix/lerp.cuh"
#include "mix/tiles.cuh"

constexpr int LOW_POINTS = 5;
constexpr int LOW_THREADS = 128;
constexpr int NARROW = 32;  // channels of a step in backward

// Channels `at` + tile_column of p, the same in each row of a tile.
__device__ __forceinline__ Accumulator channels_of(const void* p, index_t at) {
    const bf16* from = element(p, at + tile_column(lane_id(), 0));
    Accumulator m;
    load_pair(from, m.c);
    load_pair(from + 8, m.c + 4);
    #pragma unroll
    for (int e = 0; e < 2; e++) m.c[2 + e] = m.c[e], m.c[6 + e] = m.c[4 + e];
    return m;
}

// The tokens of a lane's two rows of a tile.
struct LowRows {
    int token;      // of the first; that of the second is 8 more
    bool first[2];  // of a sequence

    __device__ LowRows(const MixArguments& a, int tile) : token(tile + lane_id() / 4) {
        #pragma unroll
        for (int h = 0; h < 2; h++) first[h] = token + 8 * h < a.tokens && place_of(a, token + 8 * h).first;
    }
    // The start of a first token's row in a tensor (sequences, channels).
    __device__ index_t sequence_at(const MixArguments& a, int h) const {
        return (index_t)place_of(a, token + 8 * h).sequence * a.channels;
    }
};

// Puts `last`, or zeros, before the first tokens of sequences in a tile of the rows before.
__device__ __forceinline__ void put_last(const MixArguments& a, const LowRows& rows, int column,
                                         Accumulator& previous) {
    #pragma unroll
    for (int e = 0; e < 8; e += 2) {
        if (!rows.first[e / 2 % 2]) continue;
        previous.c[e] = previous.c[e + 1] = 0.f;
        if (a.last)
            load_pair(element(a.last, rows.sequence_at(a, e / 2 % 2) + column + tile_column(lane_id(), e)),
                      previous.c + e);
    }
}
