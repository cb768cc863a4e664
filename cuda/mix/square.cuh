// max(x, 0)^2 with what the adapters before and after it add and take, in bf16: out = max(x + left up, 0)^2 and
// right = out down; and its gradients, which have the same form: gx = 2 sqrt(out) (grad + gright downᵀ) and
// gleft = gx upᵀ.
//
// `up` and `down` are matrices of rank R, whose products are on tensor cores; or null, and stand for the identity,
// repeated along the channels: then left is added to each shard of R channels, and right is the sum over the shards.
// Either term may be missing. A block has a group of `size` channels, and gives its part of `right`.
#pragma once
#include "common/fetch.cuh"
#include "mix/rows.cuh"
#include "mix/tiles.cuh"

constexpr int SQUARE_THREADS = 2 * TILE_TOKENS;

// What a direction makes of an element, and of that of its second input where it has one.
struct Square {
    static constexpr int INPUTS = 1;
    static __device__ float of(float x, float) {
        const float positive = x < 0.f ? 0.f : x;  // NaN stays
        return positive * positive;
    }
};
struct SquareGradient {
    static constexpr int INPUTS = 2;
    static __device__ float of(float grad, float out) { return 2.f * sqrtf(out) * grad; }
};

template <int R>
constexpr int SQUARE_STEP = R > 64 ? 32 : 64;  // channels

// A step's channels of a matrix: rows (R, channels) or columns (channels, R), as it lies in memory.
template <int R>
union SquareMatrix {
    static constexpr int STEP = SQUARE_STEP<R>;
    bf16 rows[R][STEP + PADDING], columns[STEP][R + PADDING];

    __device__ void fetch(const void* by_row, const void* by_column, int channels, int c0) {
        if (by_row) fetch_rows<STEP>(rows, element(by_row, c0), channels, R, R);
        if (by_column) fetch_rows<R>(columns, element(by_column, (index_t)c0 * R), R, STEP, STEP);
    }
    // Element (i, j) of a tile: channel `channel` + i, rank `rank` + j.
    __device__ __forceinline__ Right channels_first(bool by_row, int channel, int rank) const {
        return by_row ? load_right_transposed(&rows[rank][channel], STEP + PADDING)
                      : load_right(&columns[channel][rank], R + PADDING);
    }
    // The same, transposed.
    __device__ __forceinline__ Right ranks_first(bool by_row, int channel, int rank) const {
        return by_row ? load_right(&rows[rank][channel], STEP + PADDING)
                      : load_right_transposed(&columns[channel][rank], R + PADDING);
    }
};

template <int R, class F>
struct SquareShared {
    bf16 left[TILE_TOKENS][R + PADDING];
    struct Step {  // one is filled while the other is read; the result takes the place of the first input
        bf16 inputs[F::INPUTS][TILE_TOKENS][SQUARE_STEP<R> + PADDING];
        SquareMatrix<R> up, down;
    } steps[2];
};

// x or grad; out where F is the gradient; left (tokens, R) or null, and up by row (R, channels), by column
// (channels, R), or neither; down by row, by column, or neither -> F's result, and right, where it is wanted, as float
// parts (groups, tokens, R).
template <int R, class F>
__device__ void square(const MixArguments& a) {
    constexpr int STEP = SQUARE_STEP<R>, stride = STEP + PADDING;
    auto& shared = *(SquareShared<R, F>*)dynamic_shared();
    const TilePart part(a, TILE_TOKENS);
    const int lane = lane_id(), row0 = threadIdx.x / 32 * 16;
    const bool has_left = a.inputs[2], has_up = a.inputs[3] || a.inputs[4], has_down = a.inputs[5] || a.inputs[6];
    const auto step_at = [&](int c0) -> auto& { return shared.steps[(c0 - part.begin) / STEP % 2]; };
    const auto fetch = [&](int c0) {
        auto& to = step_at(c0);
        #pragma unroll
        for (int i = 0; i < F::INPUTS; i++)
            fetch_rows<STEP>(to.inputs[i], element(a.inputs[i], (index_t)part.t0 * a.channels + c0), a.channels,
                             TILE_TOKENS, part.valid);
        to.up.fetch(a.inputs[3], a.inputs[4], a.channels, c0);
        to.down.fetch(a.inputs[5], a.inputs[6], a.channels, c0);
    };
    fetch(part.begin);
    Tile left[R / 16];
    Accumulator right[R / 16];
    #pragma unroll
    for (int k = 0; k < R / 16; k++) right[k] = zeros();
    if (has_left) {
        fetch_rows<R>(shared.left, element(a.inputs[2], (index_t)part.t0 * R), R, TILE_TOKENS, part.valid);
        cp_async_wait_all();
        __syncthreads();  // all of it is there
        #pragma unroll
        for (int k = 0; k < R / 16; k++) left[k] = load_tile(&shared.left[row0][k * 16], R + PADDING);
    }
    for (int c0 = part.begin; c0 < part.end; c0 += STEP) {
        cp_async_wait_all();
        __syncthreads();  // the step has arrived, and nobody reads the one before any more
        if (c0 + STEP < part.end) fetch(c0 + STEP);
        auto& step = step_at(c0);
        #pragma unroll 1
        for (int j = 0; j < STEP; j += 16) {
            const int shard_column = (c0 + j) % R;
            Accumulator x = widened(load_tile(&step.inputs[0][row0][j], stride)), out = zeros();
            if (F::INPUTS > 1) out = widened(load_tile(&step.inputs[F::INPUTS - 1][row0][j], stride));
            if (has_up) {
                #pragma unroll
                for (int k = 0; k < R / 16; k++) multiply(x, left[k], step.up.channels_first(a.inputs[3], j, k * 16));
            } else if (has_left) {
                const Accumulator tile = widened(load_tile(&shared.left[row0][shard_column], R + PADDING));
                #pragma unroll
                for (int e = 0; e < 8; e++) x.c[e] += tile.c[e];
            }
            #pragma unroll
            for (int e = 0; e < 8; e++) x.c[e] = F::of(x.c[e], out.c[e]);
            const Tile result = rounded(x);
            store_tile(&step.inputs[0][row0][j], stride, 16, result);
            if (!a.outputs[1]) continue;
            #pragma unroll
            for (int k = 0; k < R / 16; k++) {
                if (has_down) {
                    multiply(right[k], result, step.down.ranks_first(a.inputs[5], j, k * 16));
                } else if (shard_column == k * 16) {
                    x = widened(result);
                    #pragma unroll
                    for (int e = 0; e < 8; e++) right[k].c[e] += x.c[e];
                }
            }
        }
        __syncwarp();  // all of the warp's rows are there
        bf16* to = (bf16*)a.outputs[0] + (index_t)part.t0 * a.channels + c0;
        for (int i = lane; i < 16 * (STEP / 8); i += 32) {
            const int row = row0 + i / (STEP / 8), column = i % (STEP / 8) * 8;
            if (row < part.valid)
                store_eight(to + (index_t)row * a.channels + column, load_eight(&step.inputs[0][row][column]));
        }
    }
    if (!a.outputs[1]) return;
    float* to = (float*)a.outputs[1] + (part.group * a.tokens + part.t0 + row0) * R;
    #pragma unroll
    for (int k = 0; k < R / 16; k++)
        #pragma unroll
        for (int e = 0; e < 8; e += 2)
            if (row0 + tile_row(lane, e) < part.valid)
                store_pair(to + tile_row(lane, e) * R + k * 16 + tile_column(lane, e), right[k].c + e);
}
