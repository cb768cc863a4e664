// bat-in's affine form with bf16 products on tensor cores, for ranks that are whole tiles: u_b = B_b x_b for each shard
// b, z = x + u and shift = the sum over b of u_b; and its gradients.
#pragma once
#include "bone/arguments.cuh"
#include "common/fetch.cuh"
#include "common/tile.cuh"

// A block's tile of tokens, and how its warps share it: each has 16 tokens and one of `splits` parts of the columns.
template <int R, int WARPS>
struct Products {
    static constexpr int tokens = R > 64 ? 32 : 64;
    static constexpr int warps = WARPS, threads = 32 * WARPS;
    static constexpr int splits = WARPS / (tokens / 16);
    static constexpr int tiles = R / 16;            // of a row of a shard
    static constexpr int columns = tiles / splits;  // of these, a warp's
    static constexpr int stride = R + PADDING;
    static_assert(splits >= 1 && tiles % splits == 0, "the warps do not divide the columns");
    using Rows = bf16[tokens][stride];
    using Matrix = bf16[R][stride];

    // A warp's rows in shared memory, of R elements each.
    static __device__ __forceinline__ void load_rows(Tile (&rows)[tiles], const bf16* from) {
        #pragma unroll
        for (int k = 0; k < tiles; k++) rows[k] = load_tile(from + k * 16, stride);
    }

    // c += 16 columns, from `column` on, of these rows times B, or times Bᵀ if TURNED.
    template <bool TURNED>
    static __device__ __forceinline__ void multiply_rows(Accumulator& c, const Tile (&rows)[tiles], const Matrix& B,
                                                         int column) {
        #pragma unroll
        for (int k = 0; k < tiles; k++)
            multiply(c, rows[k],
                     TURNED ? load_tile(&B[column][k * 16], stride) : load_transposed(&B[k * 16][column], stride));
    }
};
template <int R>
using ForwardProducts = Products<R, 4>;
template <int R>
using BackwardProducts = Products<R, (R > 64 ? 8 : 4)>;

template <int R>
struct ForwardShared {  // two of each: one is filled while the other is read
    typename ForwardProducts<R>::Rows x[2];
    typename ForwardProducts<R>::Matrix bone[2];
};
template <int R>
struct BackwardShared {
    typename BackwardProducts<R>::Rows d[2], g[2], x[2];
    typename BackwardProducts<R>::Matrix bone;
};

// A block has a tile of tokens and a group of the shards.
template <int R>
__device__ void products_forward(const BoneArguments& a) {
    using P = ForwardProducts<R>;
    auto& shared = *(ForwardShared<R>*)dynamic_shared();
    const int group = blockIdx.x % a.groups, shards = a.width / R;
    const index_t t0 = (index_t)(blockIdx.x / a.groups) * P::tokens;
    const int valid = (int)min((index_t)P::tokens, a.tokens - t0);
    const int first = (int)((index_t)group * shards / a.groups), last = (int)((index_t)(group + 1) * shards / a.groups);
    const int warp = threadIdx.x / 32, row0 = warp / P::splits * 16, tile0 = warp % P::splits * P::columns;
    const auto fetch = [&](int b) {
        const int stage = (b - first) % 2;
        fetch_rows<R>(shared.x[stage], (const bf16*)a.x + t0 * a.width + b * R, a.width, P::tokens, valid);
        fetch_rows<R>(shared.bone[stage], (const bf16*)a.bone + (index_t)b * R * R, R, R, R);
    };
    Accumulator sums[P::columns];
    #pragma unroll
    for (int i = 0; i < P::columns; i++) sums[i] = zeros();
    fetch(first);
    for (int b = first; b < last; b++) {
        const int stage = (b - first) % 2;
        cp_async_wait_all();
        __syncthreads();  // shard b has arrived, and nobody reads the one before any more
        if (b + 1 < last) fetch(b + 1);
        const bf16* x = shared.x[stage][row0];
        Tile rows[P::tiles];
        P::load_rows(rows, x);
        #pragma unroll
        for (int i = 0; i < P::columns; i++) {
            const int column = (tile0 + i) * 16;
            Accumulator u = zeros();
            P::template multiply_rows<true>(u, rows, shared.bone[stage], column);
            add(sums[i], u);
            add(u, widened(load_tile(x + column, P::stride)));
            store_tile((bf16*)a.z + (t0 + row0) * a.width + b * R + column, a.width, valid - row0, rounded(u));
        }
    }
    bf16* shift = (bf16*)a.shift + (group * a.tokens + t0 + row0) * R;
    #pragma unroll
    for (int i = 0; i < P::columns; i++) {
        store_tile(shift + (tile0 + i) * 16, R, valid - row0, rounded(sums[i]));
    }
}

// A block has a shard b and a strip of tokens: du = d + g, dx = d + Bᵀ du, and, if x is given, the strip's part
// of dB = sum over tokens of du xᵀ.
template <int R>
__device__ void products_backward(const BoneArguments& a) {
    using P = BackwardProducts<R>;
    constexpr int MINE = (P::tiles * P::tiles + P::warps - 1) / P::warps;  // a warp's tiles of dB, one below another
    static_assert(P::warps % P::tiles == 0, "a warp's tiles have not the same columns");
    auto& shared = *(BackwardShared<R>*)dynamic_shared();
    const int shards = a.width / R, b = blockIdx.x % shards, strip = blockIdx.x / shards;
    const index_t begin = (index_t)strip * a.strip, end = min(begin + a.strip, a.tokens);
    const int warp = threadIdx.x / 32, row0 = warp / P::splits * 16, tile0 = warp % P::splits * P::columns;
    const int j = warp % P::tiles * 16;
    const auto row_of = [&](int m) { return (warp + m * P::warps) / P::tiles * 16; };
    const auto fetch = [&](index_t t0, int stage) {
        const int valid = (int)min((index_t)P::tokens, end - t0);
        const index_t at = t0 * a.width + b * R;
        fetch_rows<R>(shared.d[stage], (const bf16*)a.d + at, a.width, P::tokens, valid);
        fetch_rows<R>(shared.g[stage], (const bf16*)a.g + t0 * R, R, P::tokens, valid);
        if (a.x) fetch_rows<R>(shared.x[stage], (const bf16*)a.x + at, a.width, P::tokens, valid);
    };
    Accumulator sums[MINE];
    #pragma unroll
    for (int m = 0; m < MINE; m++) sums[m] = zeros();
    fetch_rows<R>(shared.bone, (const bf16*)a.bone + (index_t)b * R * R, R, R, R);
    fetch(begin, 0);
    int stage = 0;
    for (index_t t0 = begin; t0 < end; t0 += P::tokens, stage ^= 1) {
        cp_async_wait_all();
        __syncthreads();  // the tile has arrived, and nobody reads the one before any more
        if (t0 + P::tokens < end) fetch(t0 + P::tokens, stage ^ 1);
        const auto& d = shared.d[stage];
        auto& du = shared.g[stage];
        for (int i = threadIdx.x; i < P::tokens * (R / 2); i += P::threads) {
            const int row = i / (R / 2), column = i % (R / 2) * 2;
            const uint32_t x = *(const uint32_t*)&d[row][column], y = *(const uint32_t*)&du[row][column];
            *(uint32_t*)&du[row][column] = pack_bf16(low_half(x) + low_half(y), high_half(x) + high_half(y));
        }
        __syncthreads();
        Tile rows[P::tiles];
        P::load_rows(rows, du[row0]);
        #pragma unroll
        for (int i = 0; i < P::columns; i++) {
            const int column = (tile0 + i) * 16;
            Accumulator dx = widened(load_tile(&d[row0][column], P::stride));
            P::template multiply_rows<false>(dx, rows, shared.bone, column);
            bf16* to = (bf16*)a.dx + (t0 + row0) * a.width + b * R + column;
            store_tile(to, a.width, (int)min((index_t)16, end - t0 - row0), rounded(dx));
        }
        if (!a.x) continue;
        #pragma unroll
        for (int t = 0; t < P::tokens; t += 16) {
            const Tile x = load_transposed(&shared.x[stage][t][j], P::stride);
            #pragma unroll
            for (int m = 0; m < MINE; m++)
                if (row_of(m) < R) multiply(sums[m], load_transposed(&du[t][row_of(m)], P::stride), x);
        }
    }
    if (!a.x) return;
    float* part = a.parts + ((index_t)strip * shards + b) * R * R;
    #pragma unroll
    for (int m = 0; m < MINE; m++) {
        if (row_of(m) >= R) break;
        #pragma unroll
        for (int e = 0; e < 8; e += 2)
            *(Pair*)&part[(row_of(m) + tile_row(lane_id(), e)) * R + j + tile_column(lane_id(), e)] =
                Pair{{sums[m].c[e], sums[m].c[e + 1]}};
    }
}

template <int R>
struct MergeShared {
    typename ForwardProducts<R>::Rows x[2];
    typename ForwardProducts<R>::Matrix bone;
};

// bat-out's merged weight, z = x + x B_a + B_a for the output blocks a of x: (a R, width). Each has R width / R rows of
// R elements, and a block of threads takes `strip` of them. B_a is added to each shard.
template <int R>
__device__ void products_merge(const BoneArguments& a) {
    using P = ForwardProducts<R>;
    auto& shared = *(MergeShared<R>*)dynamic_shared();
    const int shards = a.width / R, rows = R * shards, strips = (rows + a.strip - 1) / a.strip;
    const int block = blockIdx.x / strips, begin = blockIdx.x % strips * a.strip, end = min(begin + a.strip, rows);
    const int warp = threadIdx.x / 32, row0 = warp / P::splits * 16, tile0 = warp % P::splits * P::columns;
    const index_t first = (index_t)block * rows * R;
    const auto fetch = [&](int row, int stage) {
        fetch_rows<R>(shared.x[stage], (const bf16*)a.x + first + (index_t)row * R, R, P::tokens, end - row);
    };
    fetch_rows<R>(shared.bone, (const bf16*)a.bone + (index_t)block * R * R, R, R, R);
    fetch(begin, 0);
    int stage = 0;
    for (int row = begin; row < end; row += P::tokens, stage ^= 1) {
        cp_async_wait_all();
        __syncthreads();  // the tile has arrived, and nobody reads the one before any more
        if (row + P::tokens < end) fetch(row + P::tokens, stage ^ 1);
        const bf16* x = shared.x[stage][row0];
        Tile left[P::tiles];
        P::load_rows(left, x);
        #pragma unroll
        for (int i = 0; i < P::columns; i++) {
            const int column = (tile0 + i) * 16;
            Accumulator z = zeros();
            P::template multiply_rows<false>(z, left, shared.bone, column);
            #pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const int own = min(row + row0 + tile_row(lane_id(), e), rows - 1) / shards;  // of the block's outputs
                const uint32_t b = *(const uint32_t*)&shared.bone[own][column + tile_column(lane_id(), e)];
                z.c[e] += low_half(b), z.c[e + 1] += high_half(b);
            }
            add(z, widened(load_tile(x + column, P::stride)));
            bf16* to = (bf16*)a.z + first + (index_t)(row + row0) * R + column;
            store_tile(to, R, end - row - row0, rounded(z));
        }
    }
}
