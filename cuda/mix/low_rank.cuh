// Token shift with interpolation that computes its weights' low-rank product itself, in bf16 on tensor cores:
// out_i = x + (previous - x) m_i, m_i = maa_i + low_i up_i, for the five points of RWKV-6, low (tokens, 5 K) and up
// (5, K, channels). Backward is for a frozen `up`, whose gradient would need the gradients of m_i in memory.
// A block has a group of `size` channels, whose part of low's gradient is written once, and takes it in steps that read
// their `up` from the L2 cache, for 64 tokens at once.
#pragma once
#include "mix/low_tiles.cuh"

template <int K>
struct LowForwardShared {
    static constexpr int STEP = 1024 / K;  // channels
    bf16 low[TILE_TOKENS][LOW_POINTS * K + PADDING];
    struct Step {                                 // one is filled while the other is read
        bf16 x[1 + TILE_TOKENS][STEP + PADDING];  // the token before the tile is the first
        bf16 up[LOW_POINTS * K][STEP + PADDING];
    } steps[2];
};

// x, low, up; maa -> five points.
template <int K>
__device__ void low_forward(const MixArguments& a) {
    using Shared = LowForwardShared<K>;
    auto& shared = *(Shared*)dynamic_shared();
    constexpr int STEP = Shared::STEP, stride = STEP + PADDING, width = LOW_POINTS * K;
    const TilePart part(a, TILE_TOKENS);
    const int row0 = threadIdx.x / 32 * 16, before = part.t0 > 0;
    const auto fetch = [&](int c0) {
        auto& to = shared.steps[(c0 - part.begin) / STEP % 2];
        fetch_rows<STEP>(to.x + 1 - before, element(a.inputs[0], (index_t)(part.t0 - before) * a.channels + c0),
                         a.channels, TILE_TOKENS + before, part.valid + before);
        fetch_rows<STEP>(to.up, element(a.inputs[2], c0), a.channels, width, width);
    };
    fetch(part.begin);
    fetch_rows<width>(shared.low, element(a.inputs[1], (index_t)part.t0 * width), width, TILE_TOKENS, part.valid);
    const LowRows rows(a, part.t0 + row0);
    for (int c0 = part.begin; c0 < part.end; c0 += STEP) {
        cp_async_wait_all();
        __syncthreads();  // the step has arrived, and nobody reads the previous one any more
        if (c0 + STEP < part.end) fetch(c0 + STEP);
        const auto& step = shared.steps[(c0 - part.begin) / STEP % 2];
        #pragma unroll 1
        for (int j = 0; j < STEP; j += 16) {
            const Accumulator x = widened(load_tile(&step.x[row0 + 1][j], stride));
            Accumulator previous = widened(load_tile(&step.x[row0][j], stride));
            put_last(a, rows, c0 + j, previous);
            #pragma unroll
            for (int i = 0; i < LOW_POINTS; i++) {
                Accumulator m = channels_of(a.parameters[0], (index_t)i * a.channels + c0 + j);
                #pragma unroll
                for (int k = 0; k < K / 16; k++)
                    multiply(m, load_tile(&shared.low[row0][i * K + k * 16], width + PADDING),
                             load_transposed(&step.up[i * K + k * 16][j], stride));
                #pragma unroll
                for (int e = 0; e < 8; e++) m.c[e] = x.c[e] + (previous.c[e] - x.c[e]) * m.c[e];
                bf16* to = (bf16*)a.outputs[i] + (index_t)(part.t0 + row0) * a.channels + c0 + j;
                store_tile(to, a.channels, part.valid - row0, rounded(m));
            }
        }
    }
}

// In backward a warp has 16 tokens and 32 columns of their low; if K is larger, further warps take the rest.
template <int K>
constexpr int LOW_SPLITS = K / 32;

template <int K>
struct LowBackwardShared {
    bf16 low[TILE_TOKENS][LOW_POINTS * K + PADDING];
    bf16 up[LOW_POINTS * K][NARROW + PADDING];
    bf16 grads[LOW_POINTS][TILE_TOKENS][NARROW + PADDING];
    float passed[TILE_TOKENS][16 + 2];  // a token's gradient for the one before it
};

// x, low, up, five grads; maa -> the gradients of x and of `last`, and of low by a group's channels, (groups, tokens,
// 5 K). A tile's last token is the next tile's first: here only its gradient for the token before it is computed.
template <int K>
__device__ void low_backward(const MixArguments& a) {
    auto& shared = *(LowBackwardShared<K>*)dynamic_shared();
    constexpr int MINE = TILE_TOKENS - 1, PART = K / LOW_SPLITS<K>, stride = NARROW + PADDING, width = LOW_POINTS * K;
    const TilePart block(a, MINE);
    const int t0 = block.t0, valid = block.valid, mine = min(valid, MINE);
    const int lane = lane_id(), warp = threadIdx.x / 32, row0 = warp / LOW_SPLITS<K> * 16;
    const int part = warp % LOW_SPLITS<K> * PART;
    fetch_rows<width>(shared.low, element(a.inputs[1], (index_t)t0 * width), width, TILE_TOKENS, valid);
    const LowRows rows(a, t0 + row0);
    bool passes_on[2];  // true if the next token is in the same sequence
    #pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = row0 + tile_row(lane, 2 * h);
        passes_on[h] = row < mine && row + 1 < valid && !place_of(a, t0 + row + 1).first;
    }
    Accumulator glow[LOW_POINTS][PART / 16];
    #pragma unroll
    for (int m = 0; m < LOW_POINTS * (PART / 16); m++) glow[m / (PART / 16)][m % (PART / 16)] = zeros();
    for (int c0 = block.begin; c0 < block.end; c0 += NARROW) {
        #pragma unroll 1
        for (int i = 0; i < LOW_POINTS; i++)
            fetch_rows<NARROW>(shared.grads[i], element(a.inputs[3 + i], (index_t)t0 * a.channels + c0), a.channels,
                               TILE_TOKENS, valid);
        fetch_rows<NARROW>(shared.up, element(a.inputs[2], c0), a.channels, width, width);
        cp_async_wait_all();
        __syncthreads();  // the step's rows have arrived
        #pragma unroll 1
        for (int j = 0; j < NARROW; j += 16) {
            const int column = c0 + j + tile_column(lane, 0);
            Accumulator x = zeros(), change = zeros();  // change: previous - x
            #pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const int t = rows.token + (e & 2) * 4;
                const bf16* from = element(a.inputs[0], (index_t)t * a.channels + column + tile_column(0, e));
                if (t < a.tokens) load_pair(from, x.c + e);
                if (t < a.tokens && !rows.first[e / 2 % 2]) load_pair(from - a.channels, change.c + e);
            }
            put_last(a, rows, c0 + j, change);
            #pragma unroll
            for (int e = 0; e < 8; e++) change.c[e] -= x.c[e];
            Accumulator gx = zeros(), passed = zeros();
            #pragma unroll
            for (int i = LOW_POINTS - 1; i >= 0; i--) {  // so that no registers spill
                Accumulator m = channels_of(a.parameters[0], (index_t)i * a.channels + c0 + j);
                #pragma unroll
                for (int k = 0; k < K / 16; k++)
                    multiply(m, load_tile(&shared.low[row0][i * K + k * 16], width + PADDING),
                             load_transposed(&shared.up[i * K + k * 16][j], stride));
                const Accumulator grad = widened(load_tile(&shared.grads[i][row0][j], stride));
                Accumulator goffset;
                #pragma unroll
                for (int e = 0; e < 8; e++) {
                    const float part = grad.c[e] * m.c[e];
                    gx.c[e] += grad.c[e] - part;
                    passed.c[e] += part;
                    goffset.c[e] = grad.c[e] * change.c[e];
                }
                const Tile left = rounded(goffset);
                #pragma unroll
                for (int k = 0; k < PART / 16; k++)
                    multiply(glow[i][k], left, load_tile(&shared.up[i * K + part + k * 16][j], stride));
            }
            #pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const int row = row0 + tile_row(lane, e);
                if (part > 0) break;
                *(Pair*)&shared.passed[row][tile_column(lane, e)] = Pair{{passed.c[e], passed.c[e + 1]}};
                if (a.glast && rows.first[e / 2 % 2] && row < mine)
                    store_pair((bf16*)a.glast + rows.sequence_at(a, e / 2 % 2) + column + tile_column(0, e),
                               passed.c + e);
            }
            __syncthreads();  // each row's gradient for the row before is written
            #pragma unroll
            for (int e = 0; e < 8; e += 2) {
                if (!passes_on[e / 2 % 2]) continue;
                const Pair later = *(const Pair*)&shared.passed[row0 + tile_row(lane, e) + 1][tile_column(lane, e)];
                gx.c[e] += later.x[0], gx.c[e + 1] += later.x[1];
            }
            bf16* to = (bf16*)a.outputs[0] + (index_t)(t0 + row0) * a.channels + c0 + j;
            store_tile(to, a.channels, part > 0 ? 0 : mine - row0, rounded(gx));
            __syncthreads();  // and nobody reads it, or the step's rows, any more
        }
    }
    bf16* to = (bf16*)a.outputs[1] + (block.group * a.tokens + t0 + row0) * width;
    #pragma unroll
    for (int i = 0; i < LOW_POINTS; i++)
        #pragma unroll
        for (int k = 0; k < PART / 16; k++)
            store_tile(to + i * K + part + k * 16, width, mine - row0, rounded(glow[i][k]));
}
