// Tiles of tokens and channels for the kernels of low_rank.cuh: what they read, normalized and as mixing takes it.
#pragma once
#include "common/fetch.cuh"
#include "mix/lerp.cuh"
#include "mix/norm_rows.cuh"
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

// Normalizes a tile whose rows' tokens are `shift` before those of `rows`.
__device__ __forceinline__ void normalize_tile(const MixArguments& a, const LowRows& rows, int shift, int column,
                                               Accumulator& x) {
    const Accumulator weight = channels_of(a.parameters[1], column), bias = channels_of(a.parameters[2], column);
    #pragma unroll
    for (int h = 0; h < 2; h++) {
        const int t = rows.token + 8 * h;
        RowStats stats{0.f, 0.f};
        if (t >= shift && t < a.tokens) stats = stats_of(a, t - shift);
        #pragma unroll
        for (int e = 0; e < 8; e++)
            if (e / 2 % 2 == h) x.c[e] = bias.c[e] + (x.c[e] - stats.mean) * stats.scale * weight.c[e];
    }
    x = widened(rounded(x));
}
// Prepares a tile of x and that of the rows before for mixing: normalizes them, and puts `last` before sequences.
__device__ __forceinline__ void settle(const MixArguments& a, const LowRows& rows, int column, Accumulator& x,
                                       Accumulator& previous) {
    if (a.inputs[3]) {
        normalize_tile(a, rows, 0, column, x);
        normalize_tile(a, rows, 1, column, previous);
    }
    #pragma unroll
    for (int e = 0; e < 8; e += 2) {
        if (!rows.first[e / 2 % 2]) continue;
        previous.c[e] = previous.c[e + 1] = 0.f;
        if (a.last)
            load_pair(element(a.last, rows.sequence_at(a, e / 2 % 2) + column + tile_column(lane_id(), e)),
                      previous.c + e);
    }
}

// Starts the copy of a tile's rows of low, and waits for it if their tanh is still to be taken.
template <int WIDTH>
__device__ __forceinline__ void fetch_low(const MixArguments& a, const TilePart& part, bf16 (*low)[WIDTH + PADDING]) {
    fetch_rows<WIDTH>(low, element(a.inputs[1], (index_t)part.t0 * WIDTH), WIDTH, TILE_TOKENS, part.valid);
    if (!a.inputs[3]) return;
    cp_async_wait_all();
    for (int i = threadIdx.x; i < TILE_TOKENS * (WIDTH / 8); i += blockDim.x) {  // each thread its own copies
        bf16* at = &low[i / (WIDTH / 8)][i % (WIDTH / 8) * 8];
        float x[8];
        load_vector<bf16, 8>(x, at);
        #pragma unroll
        for (int e = 0; e < 8; e++) x[e] = tanhf(x[e]);
        store_vector<bf16, 8>(at, x);
    }
}
