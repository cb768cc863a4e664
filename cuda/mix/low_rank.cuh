// Token shift with interpolation whose weights have their product of low rank inside, in bf16 on tensor cores:
// out_i = x + (previous - x) m_i, m_i = maa_i + low_i up_i, for the five points of RWKV-6, low (tokens, 5 K) and up
// (5, K, channels). Backward is for a frozen `up`, whose gradient would need the gradients of m_i in memory.
#pragma once
#include "common/fetch.cuh"
#include "mix/lerp.cuh"

constexpr int LOW_POINTS = 5;
constexpr int LOW_THREADS = 128;
constexpr int LOW_TOKENS = 64;  // of a tile, 16 a warp
constexpr int WIDE = 64;        // channels of a tile in forward
constexpr int NARROW = 32;      // of a step in backward

__device__ __forceinline__ const bf16* element(const void* p, index_t at) { return (const bf16*)p + at; }

// What precedes token t in channel c: null for zeros.
__device__ __forceinline__ const bf16* previous_of(const MixArguments& a, index_t t, const Place& place, index_t c) {
    if (!place.first) return element(a.inputs[0], (t - 1) * a.channels + c);
    return a.last ? element(a.last, (index_t)place.sequence * a.channels + c) : nullptr;
}

// Channels column + tile_column of maa_i, as each row of a tile has them.
__device__ __forceinline__ Accumulator maa_of(const MixArguments& a, int i, int column) {
    const bf16* maa = element(a.parameters[0], (index_t)i * a.channels + column + tile_column(lane_id(), 0));
    Accumulator m;
    load_pair(maa, m.c);
    load_pair(maa + 8, m.c + 4);
    #pragma unroll
    for (int e = 0; e < 2; e++) m.c[2 + e] = m.c[e], m.c[6 + e] = m.c[4 + e];
    return m;
}

template <int K>
struct LowForwardShared {
    bf16 x[LOW_TOKENS][WIDE + PADDING], previous[LOW_TOKENS][WIDE + PADDING];
    struct Factors {  // of one point; one is filled while the other is read
        bf16 low[LOW_TOKENS][K + PADDING], up[K][WIDE + PADDING];
    } factors[2];
};

// x, low, up; maa -> five points. A block has a tile of tokens and channels.
template <int K>
__device__ void low_forward(const MixArguments& a) {
    auto& shared = *(LowForwardShared<K>*)dynamic_shared();
    constexpr int stride = WIDE + PADDING;
    const int tiles = a.channels / WIDE, c0 = blockIdx.x % tiles * WIDE, row0 = threadIdx.x / 32 * 16;
    const index_t t0 = (index_t)(blockIdx.x / tiles) * LOW_TOKENS;
    const int valid = (int)min((index_t)LOW_TOKENS, a.tokens - t0);
    const auto fetch = [&](int i) {
        auto& to = shared.factors[i % 2];
        fetch_rows<K>(to.low, element(a.inputs[1], (t0 * LOW_POINTS + i) * K), LOW_POINTS * K, LOW_TOKENS, valid);
        fetch_rows<WIDE>(to.up, element(a.inputs[2], (index_t)i * K * a.channels + c0), a.channels, K, K);
    };
    fetch_rows<WIDE>(shared.x, element(a.inputs[0], t0 * a.channels + c0), a.channels, LOW_TOKENS, valid);
    for (int i = threadIdx.x; i < LOW_TOKENS * (WIDE / 8); i += LOW_THREADS) {
        const int row = i / (WIDE / 8), column = i % (WIDE / 8) * 8;
        const index_t t = t0 + row;
        const bf16* from = row < valid ? previous_of(a, t, place_of(a, t), c0 + column) : nullptr;
        cp_async_16(&shared.previous[row][column], from ? from : element(a.inputs[0], 0), from != nullptr);
    }
    fetch(0);
    for (int i = 0; i < LOW_POINTS; i++) {
        cp_async_wait_all();
        __syncthreads();  // the point's factors have arrived, and nobody reads those before any more
        if (i + 1 < LOW_POINTS) fetch(i + 1);
        const auto& factors = shared.factors[i % 2];
        Tile low[K / 16];
        #pragma unroll
        for (int k = 0; k < K / 16; k++) low[k] = load_tile(&factors.low[row0][k * 16], K + PADDING);
        #pragma unroll
        for (int j = 0; j < WIDE; j += 16) {
            const Accumulator maa = maa_of(a, i, c0 + j);
            Accumulator out = zeros();
            #pragma unroll
            for (int k = 0; k < K / 16; k++) multiply(out, low[k], load_transposed(&factors.up[k * 16][j], stride));
            const Accumulator x = widened(load_tile(&shared.x[row0][j], stride));
            const Accumulator previous = widened(load_tile(&shared.previous[row0][j], stride));
            #pragma unroll
            for (int e = 0; e < 8; e++) out.c[e] = x.c[e] + (previous.c[e] - x.c[e]) * (out.c[e] + maa.c[e]);
            store_tile((bf16*)a.outputs[i] + (t0 + row0) * a.channels + c0 + j, a.channels, valid - row0, rounded(out));
        }
    }
}

// In backward a warp has 16 tokens and 32 columns of their low: where K is more, several do the same for the rest.
template <int K>
constexpr int LOW_SPLITS = K / 32;

template <int K>
struct LowBackwardShared {
    bf16 low[LOW_TOKENS][LOW_POINTS * K + PADDING];
    bf16 up[LOW_POINTS][K][NARROW + PADDING];
    bf16 grads[LOW_POINTS][LOW_TOKENS][NARROW + PADDING];
    float passed[LOW_TOKENS][16 + 2];  // the gradient of what precedes a token
};

// x, low, up, five grads; maa -> gx, glast, and glow of a group of channels, (groups, tokens, 5 K). A block has a group
// of `size` channels and a tile of tokens, the last of which is the next tile's first: its gradient of what precedes it
// is all that is wanted of it here.
template <int K>
__device__ void low_backward(const MixArguments& a) {
    auto& shared = *(LowBackwardShared<K>*)dynamic_shared();
    constexpr int MINE = LOW_TOKENS - 1, PART = K / LOW_SPLITS<K>, stride = NARROW + PADDING, width = LOW_POINTS * K;
    const int groups = (a.channels + a.size - 1) / a.size, group = blockIdx.x % groups;
    const index_t t0 = (index_t)(blockIdx.x / groups) * MINE;
    const int valid = (int)min((index_t)LOW_TOKENS, a.tokens - t0), mine = min(valid, MINE);
    const int lane = lane_id(), warp = threadIdx.x / 32, row0 = warp / LOW_SPLITS<K> * 16;
    const int part = warp % LOW_SPLITS<K> * PART;
    fetch_rows<width>(shared.low, element(a.inputs[1], t0 * width), width, LOW_TOKENS, valid);
    Place places[2];    // of a lane's two rows
    bool passes_on[2];  // whether the token after is of the same sequence
    #pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = row0 + tile_row(lane, 2 * h);
        places[h] = row < valid ? place_of(a, t0 + row) : Place{0, false};
        passes_on[h] = row < mine && row + 1 < valid && !place_of(a, t0 + row + 1).first;
    }
    Accumulator glow[LOW_POINTS][PART / 16];
    #pragma unroll
    for (int m = 0; m < LOW_POINTS * (PART / 16); m++) glow[m / (PART / 16)][m % (PART / 16)] = zeros();
    const int end = min((group + 1) * a.size, a.channels);
    for (int c0 = group * a.size; c0 < end; c0 += NARROW) {
        #pragma unroll 1
        for (int i = 0; i < LOW_POINTS; i++) {
            const bf16* grad = element(a.inputs[3 + i], t0 * a.channels + c0);
            fetch_rows<NARROW>(shared.grads[i], grad, a.channels, LOW_TOKENS, valid);
            fetch_rows<NARROW>(shared.up[i], element(a.inputs[2], (index_t)i * K * a.channels + c0), a.channels, K, K);
        }
        cp_async_wait_all();
        __syncthreads();  // the step's rows have arrived
        #pragma unroll 1
        for (int j = 0; j < NARROW; j += 16) {
            const int column = c0 + j + tile_column(lane, 0);
            Accumulator change = zeros();  // previous - x
            #pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const int row = row0 + tile_row(lane, e), c = column + tile_column(0, e);
                if (row >= valid) continue;
                float x[2], before[2] = {0.f, 0.f};
                load_pair(element(a.inputs[0], (t0 + row) * a.channels + c), x);
                const bf16* from = previous_of(a, t0 + row, places[e / 2 % 2], c);
                if (from) load_pair(from, before);
                change.c[e] = before[0] - x[0], change.c[e + 1] = before[1] - x[1];
            }
            Accumulator gx = zeros(), passed = zeros();
            #pragma unroll
            for (int i = 0; i < LOW_POINTS; i++) {
                Accumulator m = maa_of(a, i, c0 + j);
                #pragma unroll
                for (int k = 0; k < K / 16; k++)
                    multiply(m, load_tile(&shared.low[row0][i * K + k * 16], width + PADDING),
                             load_transposed(&shared.up[i][k * 16][j], stride));
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
                    multiply(glow[i][k], left, load_tile(&shared.up[i][part + k * 16][j], stride));
            }
            #pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const int row = row0 + tile_row(lane, e);
                if (part > 0) break;
                *(Pair*)&shared.passed[row][tile_column(lane, e)] = Pair{{passed.c[e], passed.c[e + 1]}};
                const Place& place = places[e / 2 % 2];
                if (a.glast && place.first && row < mine)
                    store_pair((bf16*)a.glast + (index_t)place.sequence * a.channels + column + tile_column(0, e),
                               passed.c + e);
            }
            __syncthreads();  // a row's gradient is there for the row before
            #pragma unroll
            for (int e = 0; e < 8; e += 2) {
                if (!passes_on[e / 2 % 2]) continue;
                const Pair later = *(const Pair*)&shared.passed[row0 + tile_row(lane, e) + 1][tile_column(lane, e)];
                gx.c[e] += later.x[0], gx.c[e + 1] += later.x[1];
            }
            bf16* to = (bf16*)a.outputs[0] + (t0 + row0) * a.channels + c0 + j;
            store_tile(to, a.channels, part > 0 ? 0 : mine - row0, rounded(gx));
            __syncthreads();  // and nobody reads it, or the step's rows, any more
        }
    }
    bf16* to = (bf16*)a.outputs[1] + (group * a.tokens + t0 + row0) * width;
    #pragma unroll
    for (int i = 0; i < LOW_POINTS; i++)
        #pragma unroll
        for (int k = 0; k < PART / 16; k++)
            store_tile(to + i * K + part + k * 16, width, mine - row0, rounded(glow[i][k]));
}
