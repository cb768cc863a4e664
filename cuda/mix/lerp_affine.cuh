// Points of a lerp as bat-in takes them: u_b = B_b x_b for each shard b of a point x, z = x + u and the sum over b of
// u_b; and the gradients, in bf16 on tensor cores. bone/products.cuh has the same of an x in memory, where a point is
// not, forward or backward.
//
// Of a point without a B, which is written as it is, the sum over shards may be wanted, too.
//
// As in low_rank.cuh x may be what a norm's stats normalize; a point's weights are maa, to which the product of low,
// before its tanh, and up is added where there are such; and of the first point all that is wanted may be its product
// with `down`. A block has one point, so that few registers and little shared memory are its own; those of a tile's
// other points find x in the L2 cache.
#pragma once
#include "mix/low_rank.cuh"

constexpr int AFFINE_TOKENS = 128, AFFINE_FORWARD_THREADS = 2 * AFFINE_TOKENS;  // of a tile in forward
constexpr int AFFINE_BACKWARD_THREADS = 2 * TILE_TOKENS;
constexpr int WIDE = 64;      // channels of a step: whole shards
constexpr int MOST_LOW = 64;  // columns of a point's low
constexpr int WIDE_STRIDE = WIDE + PADDING;
constexpr int FIRST_BONE = 5, FIRST_OF_D = 11, FIRST_OF_G = 17;  // of the inputs, a point's after a point's
constexpr int AFFINE_PARTS = 6, AFFINE_SHIFTS = 7;               // of the outputs

using WideRow = bf16[WIDE_STRIDE];
using Matrix = bf16[WIDE][WIDE_STRIDE];

__device__ __forceinline__ bool is_summed(const MixArguments& a, int i) { return a.summed >> i & 1; }
// How many of the points before `end` have a B, or are summed.
__device__ __forceinline__ int bent_before(const MixArguments& a, int end) {
    int count = 0;
    for (int i = 0; i < end; i++) count += a.inputs[FIRST_BONE + i] || is_summed(a, i);
    return count;
}

// Starts the copy of a tile's tokens of x; the one before it is the first.
__device__ __forceinline__ void fetch_x(const MixArguments& a, WideRow* to, index_t t0, int tokens, int valid, int c0) {
    const int before = t0 > 0;
    fetch_rows<WIDE>(to + 1 - before, element(a.inputs[0], (t0 - before) * a.channels + c0), a.channels,
                     tokens + before, valid + before);
}
// The same of point i's `up`.
__device__ __forceinline__ void fetch_up(const MixArguments& a, Matrix& to, int i, int c0) {
    const int rows = a.low_rank;
    fetch_rows<WIDE>(to, element(a.inputs[2], (index_t)i * rows * a.channels + c0), a.channels, rows, rows);
}
// The same of the matrices of a step's shards, one below another.
template <int R>
__device__ __forceinline__ void fetch_bone(const MixArguments& a, Matrix& to, int i, int c0) {
    fetch_rows<R>((bf16(*)[R + PADDING]) to, element(a.inputs[FIRST_BONE + i], (index_t)c0 * R), R, WIDE, WIDE);
}

// A warp's rows of point i's low, with their tanh where stats are given; zeros past the last token.
__device__ __forceinline__ void load_low(const MixArguments& a, const LowRows& rows, int i,
                                         Tile (&low)[MOST_LOW / 16]) {
    #pragma unroll
    for (int k = 0; k < MOST_LOW / 16; k++) {
        if (k * 16 >= a.low_rank) break;
        #pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const index_t t = rows.token + (e & 2) * 4;
            float x[2] = {0.f, 0.f};
            if (t < a.tokens)
                load_pair(element(a.inputs[1], (t * a.n + i) * a.low_rank + k * 16 + tile_column(lane_id(), e)), x);
            if (a.inputs[3]) x[0] = tanhf(x[0]), x[1] = tanhf(x[1]);
            low[k].x[e / 2] = pack_bf16(x[0], x[1]);
        }
    }
}

// A warp's 16 tokens of point i, WIDE channels from c0 on; from: of x, the token before them first.
__device__ __forceinline__ void make_point(const MixArguments& a, const LowRows& rows, int i, int c0,
                                           const WideRow* from, const Tile (&low)[MOST_LOW / 16], const Matrix& up,
                                           Tile (&point)[WIDE / 16]) {
    #pragma unroll
    for (int j = 0; j < WIDE / 16; j++) {
        const int column = j * 16;
        Accumulator x = widened(load_tile(&from[1][column], WIDE_STRIDE));
        Accumulator previous = widened(load_tile(&from[0][column], WIDE_STRIDE));
        settle(a, rows, c0 + column, x, previous);
        Accumulator m = channels_of(a.parameters[0], (index_t)i * a.channels + c0 + column);
        #pragma unroll
        for (int k = 0; k < MOST_LOW / 16; k++) {
            if (k * 16 >= a.low_rank) break;
            multiply(m, low[k], load_transposed(&up[k * 16][column], WIDE_STRIDE));
        }
        #pragma unroll
        for (int e = 0; e < 8; e++) m.c[e] = x.c[e] + (previous.c[e] - x.c[e]) * m.c[e];
        point[j] = rounded(m);
    }
}

struct AffineForwardShared {
    struct Step {  // one is filled while the other is read
        WideRow x[1 + AFFINE_TOKENS];
        Matrix up, matrix;
    } steps[2];
};

// x, low, up, stats, down or null, B of each point or null; maa, weight and bias where stats are -> the points, bent
// where they have a B; a group's part of the first one's product with `down`, float (groups, tokens, 2 K), and of the
// sums over shards, (points with a B or summed, groups, tokens, R). A block has a tile of tokens, a group of the
// channels, and a point, or WIDE columns of that product.
template <int R>
__device__ void lerp_affine_forward(const MixArguments& a) {
    auto& shared = *(AffineForwardShared*)dynamic_shared();
    const int products = a.inputs[4] ? 2 * a.low_rank / WIDE : 0;
    const int slots = products + a.n - (products > 0), slot = blockIdx.x % slots;
    const bool is_product = slot < products;
    const int i = is_product ? 0 : slot - products + (products > 0);
    const TilePart part(a, AFFINE_TOKENS, blockIdx.x / slots, AFFINE_TOKENS);
    const int row0 = threadIdx.x / 32 * 16;
    const bool bends = !is_product && a.inputs[FIRST_BONE + i], sums_up = !is_product && is_summed(a, i);
    const auto fetch = [&](int c0) {
        auto& to = shared.steps[(c0 - part.begin) / WIDE % 2];
        fetch_x(a, to.x, part.t0, AFFINE_TOKENS, part.valid, c0);
        fetch_up(a, to.up, i, c0);
        if (is_product)
            fetch_rows<WIDE>(to.matrix, element(a.inputs[4], (index_t)c0 * 2 * a.low_rank + slot * WIDE),
                             2 * a.low_rank, WIDE, WIDE);
        else if (bends)
            fetch_bone<R>(a, to.matrix, i, c0);
    };
    fetch(part.begin);
    const LowRows rows(a, part.t0 + row0);
    Tile low[MOST_LOW / 16];
    load_low(a, rows, i, low);
    Accumulator sums[WIDE / 16];
    #pragma unroll
    for (int c = 0; c < WIDE / 16; c++) sums[c] = zeros();
    for (int c0 = part.begin; c0 < part.end; c0 += WIDE) {
        cp_async_wait_all();
        __syncthreads();  // the step has arrived, and nobody reads the one before any more
        if (c0 + WIDE < part.end) fetch(c0 + WIDE);
        const auto& step = shared.steps[(c0 - part.begin) / WIDE % 2];
        Tile point[WIDE / 16];
        make_point(a, rows, i, c0, step.x + row0, low, step.up, point);
        #pragma unroll
        for (int c = 0; c < WIDE / 16; c++) {
            if (is_product) {
                #pragma unroll
                for (int k = 0; k < WIDE / 16; k++)
                    multiply(sums[c], point[k], load_transposed(&step.matrix[k * 16][c * 16], WIDE_STRIDE));
                continue;
            }
            Accumulator z = widened(point[c]);
            if (bends) {
                const bf16* bone = step.matrix[0] + c * 16 * (R + PADDING);
                Accumulator u = zeros();
                #pragma unroll
                for (int k = 0; k < R / 16; k++)
                    multiply(u, point[c * 16 / R * (R / 16) + k], load_tile(bone + k * 16, R + PADDING));
                add(sums[c % (R / 16)], u);
                add(z, u);
            }
            if (sums_up) add(sums[c % (R / 16)], z);
            bf16* to = (bf16*)a.outputs[i] + (index_t)(part.t0 + row0) * a.channels + c0 + c * 16;
            store_tile(to, a.channels, part.valid - row0, rounded(z));
        }
    }
    const int groups = (a.channels + a.size - 1) / a.size;
    if (is_product) {
        const int width = 2 * a.low_rank;
        float* to = (float*)a.outputs[AFFINE_PARTS] + (part.group * a.tokens + part.t0) * width + slot * WIDE;
        #pragma unroll
        for (int c = 0; c < WIDE / 16; c++)
            #pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const int row = row0 + tile_row(lane_id(), e);
                if (row < part.valid) store_pair(to + row * width + c * 16 + tile_column(lane_id(), e), sums[c].c + e);
            }
    } else if (bends || sums_up) {
        const index_t at = (index_t)bent_before(a, i) * groups + part.group;
        bf16* to = (bf16*)a.outputs[AFFINE_SHIFTS] + (at * a.tokens + part.t0 + row0) * R;
        #pragma unroll
        for (int c = 0; c < R / 16; c++) store_tile(to + c * 16, R, part.valid - row0, rounded(sums[c]));
    }
}

struct AffineBackwardShared {
    WideRow d[2][TILE_TOKENS], g[2][TILE_TOKENS];
    WideRow x[2][1 + TILE_TOKENS];  // becomes the point's tile, from the second row on
    Matrix up, bone;
};

// x, low, up, stats, of each point that has one B, its bent form's gradient d and that of its sum over shards g
// (tokens, R); maa, weight and bias where stats are -> the points' gradients d + Bᵀ (d + g), and a strip's part of
// those of B, float (strips, points with a B, channels / R, R, R), or null. A block has a strip of tokens, WIDE
// channels and a point.
template <int R>
__device__ void lerp_affine_backward(const MixArguments& a) {
    constexpr int SIDE = R / 16;  // tiles; as many of a step's B as a warp has, which share their columns
    auto& shared = *(AffineBackwardShared*)dynamic_shared();
    const int slots = bent_before(a, a.n), slot = blockIdx.x % slots, steps = a.channels / WIDE;
    const int c0 = (int)(blockIdx.x / slots) % steps * WIDE, strip = (int)(blockIdx.x / slots) / steps;
    int i = 0;
    while (bent_before(a, i + 1) <= slot) i++;
    const index_t begin = (index_t)strip * a.strip, end = min(begin + a.strip, a.tokens);
    const int warp = threadIdx.x / 32, row0 = warp * 16, mine = warp / SIDE * R, column = mine + warp % SIDE * 16;
    const bool wanted = a.outputs[AFFINE_PARTS];
    const auto fetch = [&](index_t t0, int stage) {
        const int valid = (int)min((index_t)TILE_TOKENS, end - t0);
        fetch_rows<WIDE>(shared.d[stage], element(a.inputs[FIRST_OF_D + i], t0 * a.channels + c0), a.channels,
                         TILE_TOKENS, valid);
        const bf16* g = element(a.inputs[FIRST_OF_G + i], t0 * R);
        for (int at = threadIdx.x; at < TILE_TOKENS * (WIDE / 8); at += AFFINE_BACKWARD_THREADS) {  // to each shard
            const int row = at / (WIDE / 8), to = at % (WIDE / 8) * 8;
            cp_async_16(&shared.g[stage][row][to], g + (row < valid ? row * R + to % R : 0), row < valid);
        }
        if (wanted) fetch_x(a, shared.x[stage], t0, TILE_TOKENS, valid, c0);
    };
    Accumulator sums[SIDE];
    #pragma unroll
    for (int m = 0; m < SIDE; m++) sums[m] = zeros();
    fetch_bone<R>(a, shared.bone, i, c0);
    if (wanted) fetch_up(a, shared.up, i, c0);
    fetch(begin, 0);
    int stage = 0;
    for (index_t t0 = begin; t0 < end; t0 += TILE_TOKENS, stage ^= 1) {
        const LowRows rows(a, (int)t0 + row0);
        Tile low[MOST_LOW / 16], point[WIDE / 16];
        if (wanted) load_low(a, rows, i, low);
        cp_async_wait_all();
        __syncthreads();  // the tile has arrived, and nobody reads the one before any more
        if (t0 + TILE_TOKENS < end) fetch(t0 + TILE_TOKENS, stage ^ 1);
        const auto& d = shared.d[stage];
        auto& du = shared.g[stage];
        auto& x = shared.x[stage];
        for (int at = threadIdx.x; at < TILE_TOKENS * (WIDE / 2); at += AFFINE_BACKWARD_THREADS) {
            const int row = at / (WIDE / 2), to = at % (WIDE / 2) * 2;
            const uint32_t left = *(const uint32_t*)&d[row][to], right = *(const uint32_t*)&du[row][to];
            *(uint32_t*)&du[row][to] = pack_bf16(low_half(left) + low_half(right), high_half(left) + high_half(right));
        }
        if (wanted) make_point(a, rows, i, c0, x + row0, low, shared.up, point);
        __syncthreads();  // all sums are there, and nobody reads x any more
        if (wanted)
            #pragma unroll
            for (int c = 0; c < WIDE / 16; c++) store_tile(&x[row0 + 1][c * 16], WIDE_STRIDE, 16, point[c]);
        Tile left[WIDE / 16];
        #pragma unroll
        for (int k = 0; k < WIDE / 16; k++) left[k] = load_tile(&du[row0][k * 16], WIDE_STRIDE);
        #pragma unroll
        for (int c = 0; c < WIDE / 16; c++) {
            const int shard = c * 16 / R * SIDE;  // its first tile
            const bf16* bone = shared.bone[0] + shard * 16 * (R + PADDING) + c * 16 % R;
            Accumulator dx = widened(load_tile(&d[row0][c * 16], WIDE_STRIDE));
            #pragma unroll
            for (int k = 0; k < SIDE; k++)
                multiply(dx, left[shard + k], load_transposed(bone + k * 16 * (R + PADDING), R + PADDING));
            bf16* to = (bf16*)a.outputs[i] + (t0 + row0) * a.channels + c0 + c * 16;
            store_tile(to, a.channels, (int)min((index_t)16, end - t0 - row0), rounded(dx));
        }
        if (!wanted) continue;
        __syncthreads();  // the point is there
        #pragma unroll
        for (int t = 0; t < TILE_TOKENS; t += 16) {
            const Tile of_x = load_transposed(&x[t + 1][column], WIDE_STRIDE);
            #pragma unroll
            for (int m = 0; m < SIDE; m++) multiply(sums[m], load_transposed(&du[t][mine + m * 16], WIDE_STRIDE), of_x);
        }
    }
    if (!wanted) return;
    const index_t shard = ((index_t)strip * slots + slot) * (a.channels / R) + (c0 + mine) / R;
    float* part = (float*)a.outputs[AFFINE_PARTS] + shard * R * R + warp % SIDE * 16;
    #pragma unroll
    for (int m = 0; m < SIDE; m++)
        #pragma unroll
        for (int e = 0; e < 8; e += 2)
            store_pair(part + (m * 16 + tile_row(lane_id(), e)) * R + tile_column(lane_id(), e), sums[m].c + e);
}
