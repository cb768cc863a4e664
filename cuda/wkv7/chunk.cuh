// Shared by the kernels: a thread's share of a chunk, the operands made of the inputs, and the tokens' reads of
// one another's writes. The head comment of wkv7.cu explains the names.
#pragma once
#include "common/chunk.cuh"
#include "wkv7/arguments.cuh"

// A thread's share of a chunk's tensor: two neighbouring channels of four tokens.
struct Four { Pair x[4]; };

__device__ __forceinline__ Four load_four(const Shape::Rows& rows, int t, int c) {
    Four four;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t pair = *(const uint32_t*)&rows[t + i][c];
        four.x[i] = Pair{{low_half(pair), high_half(pair)}};
    }
    return four;
}

// The operands made of one chunk, all relative to its start: element (t, c) is that of token t times
//     r: the decays up to t    a: those before t    k, b: the reciprocal of those up to t
struct Operands {
    Shape::Rows r, a, k, b;
    float whole[N];  // the product of all decays
};

// A chunk's keys, k, a and b of each token.
struct Keys {
    Shape::Rows k, a, b;

    // Starts the copies; k may be spared.
    template <bool WITH_K = true>
    __device__ __forceinline__ void start_fetch(const Arguments& from, const Sequence& s, int t0) {
        if (WITH_K) fetch(k, from.k, s, t0);
        fetch(a, from.a, s, t0);
        fetch(b, from.b, s, t0);
    }
};

// A thread's share of a chunk's decays: channels c and c + 1, four tokens from t. A warp has 16 channels, so that the
// products of other tokens come from its own lanes.
struct Decays {
    int c, t;
    Pair decay[4], before, after;  // before, after: products of the decays before token t, and up to t + 3

    __device__ __forceinline__ Decays(const Shape::Rows& w, int valid, Operands& o) {
        const int lane = lane_id(), part = lane / 8;
        c = threadIdx.x / 32 * 16 + lane % 8 * 2;
        t = part * 4;
        Pair own = {{1.f, 1.f}}, whole;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t pair = *(const uint32_t*)&w[t + i][c];
            decay[i].x[0] = t + i < valid ? of(low_half(pair)) : 1.f;
            decay[i].x[1] = t + i < valid ? of(high_half(pair)) : 1.f;
            own.x[0] *= decay[i].x[0];
            own.x[1] *= decay[i].x[1];
        }
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            const float near = __shfl_xor_sync(~0u, own.x[j], 8);
            const float far = __shfl_xor_sync(~0u, own.x[j] * near, 16);
            before.x[j] = (part & 1 ? near : 1.f) * (part & 2 ? far : 1.f);
            after.x[j] = before.x[j] * own.x[j];
            whole.x[j] = own.x[j] * near * far;
        }
        if (part == 0) *(Pair*)&o.whole[c] = whole;
    }

    // A step's decay, from the raw w. A NaN stays one.
    static __device__ __forceinline__ float of(float w) {
        return exp2_approx(DECAY_RATE * LOG2_E * reciprocal_approx(1.f + exp2_approx(-w * LOG2_E)));
    }

    // Makes the operands a and, if asked, r.
    template <bool WITH_R = true>
    __device__ __forceinline__ void reads(const Four& r, const Four& a, Operands& o) const {
        Pair product = before;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            scaled(a.x[i], product, &o.a[t + i][c]);
            product.x[0] *= decay[i].x[0];
            product.x[1] *= decay[i].x[1];
            if (WITH_R) scaled(r.x[i], product, &o.r[t + i][c]);
        }
    }

    // Makes the operands b and, if asked, k.
    template <bool WITH_K = true>
    __device__ __forceinline__ void writes(const Four& k, const Four& b, Operands& o) const {
        Pair product = {{reciprocal_approx(after.x[0]), reciprocal_approx(after.x[1])}};
        #pragma unroll
        for (int i = 3; i >= 0; i--) {
            if (WITH_K) scaled(k.x[i], product, &o.k[t + i][c]);
            scaled(b.x[i], product, &o.b[t + i][c]);
            product.x[0] *= decay[i].x[0];
            product.x[1] *= decay[i].x[1];
        }
    }

    // Stores the products of the decays before each token for the epilogue, that of all decays in the last row.
    __device__ __forceinline__ void keep(float (*products)[N + 4]) const {
        Pair product = before;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            *(Pair*)&products[t + i][c] = product;
            product.x[0] *= decay[i].x[0];
            product.x[1] *= decay[i].x[1];
        }
        if (t + 4 == CHUNK) *(Pair*)&products[CHUNK][c] = product;
    }

  private:
    static __device__ __forceinline__ void scaled(const Pair& x, const Pair& factor, bf16* to) {
        *(uint32_t*)to = pack_bf16(x.x[0] * factor.x[0], x.x[1] * factor.x[1]);
    }
};

// A 16x16 matrix of token pairs in bf16, (reader, writer), padded so that eight rows touch different banks.
using PairMatrix = bf16[CHUNK][CHUNK + 8];
enum PairName { A_B, A_K, R_B, R_K, PAIRS };

// The chunk's matrices of token pairs: a reads only earlier tokens' writes, r also its own token's. In place of a's
// reads of b stands the inverse of I minus them, turned, (writer, reader), in two parts that add up.
struct PairMatrices {
    PairMatrix of[PAIRS], low;
    float lower[CHUNK][CHUNK];  // a's reads of b in float32, writers in rows, for the inversion
};

// Zeros matrix number `name` above the diagonal, and, if a reads, on it.
__device__ __forceinline__ void keep_earlier(int name, Accumulator& pairs) {
    const bool diagonal = name == R_B || name == R_K;
    const int lane = lane_id();
    #pragma unroll
    for (int e = 0; e < 8; e++) {
        const int read = tile_row(lane, e), write = tile_column(lane, e);
        if (write > read || (write == read && !diagonal)) pairs.c[e] = 0.f;
    }
}

// (I - lower)⁻¹ by one warp: each lane takes a column, by forward substitution in float32. In bf16, or as a product of
// powers, tokens that remove each other's writes would drown it in rounding errors.
__device__ __forceinline__ void invert(PairMatrices& pairs) {
    const int lane = lane_id(), column = lane % CHUNK;
    float x[CHUNK];
    #pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = i == column ? 1.f : 0.f;
    #pragma unroll
    for (int j = 0; j < CHUNK - 1; j++)
        #pragma unroll
        for (int i = j + 1; i < CHUNK; i++) x[i] += pairs.lower[j][i] * x[j];
    // Two lanes have a column: the second stores the rounding error of the first.
    const uint32_t all_of_second = lane < CHUNK ? 0 : ~0u;
    bf16* row = lane >= CHUNK ? pairs.low[column] : pairs.of[A_B][column];
    #pragma unroll
    for (int half = 0; half < CHUNK; half += 8) {
        Tile packed;
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const float left = x[half + 2 * i], right = x[half + 2 * i + 1];
            const uint32_t taken = pack_bf16(left, right) & all_of_second;
            packed.x[i] = pack_bf16(left - low_half(taken), right - high_half(taken));
        }
        *(Tile*)(row + half) = packed;
    }
}

// Matrix number `name` of all, before it is masked: the product of rows a or r with rows b or k.
__device__ __forceinline__ Accumulator pair_product(int name, const Shape::Rows& a, const Shape::Rows& r,
                                                    const Shape::Rows& b, const Shape::Rows& k) {
    constexpr int stride = Shape::stride;
    const bool of_a = name == A_B || name == A_K;
    const auto& reads = of_a ? a : r;
    const auto& writes = name == A_B || name == R_B ? b : k;
    Accumulator product = zeros();
    #pragma unroll
    for (int i = 0; i < Shape::tiles; i++)
        multiply(product, load_tile(&reads[0][i * 16], stride), load_tile(&writes[0][i * 16], stride));
    return product;
}

// A warp makes matrix number `name`.
__device__ __forceinline__ void make_pairs(int name, PairMatrices& pairs, const Operands& o) {
    const int lane = lane_id();
    Accumulator product = pair_product(name, o.a, o.r, o.b, o.k);
    keep_earlier(name, product);
    if (name != A_B) return store_tile(&pairs.of[name][0][0], CHUNK + 8, CHUNK, rounded(product));
    #pragma unroll
    for (int e = 0; e < 8; e++) pairs.lower[tile_column(lane, e)][tile_row(lane, e)] = product.c[e];
    __syncwarp();
    invert(pairs);
}

// c += a bᵀ, a rounded to twice bf16's digits and b given so.
__device__ __forceinline__ void multiply_finely(Accumulator& c, const Accumulator& a, const Tile& b,
                                                const Tile& b_low) {
    const Tile high = rounded(a);
    const Accumulator of_high = widened(high);
    Accumulator rest;
    #pragma unroll
    for (int e = 0; e < 8; e++) rest.c[e] = a.c[e] - of_high.c[e];
    multiply(c, high, b_low);
    multiply(c, rounded(rest), b);
    multiply(c, high, b);
}

// removed of a chunk, (v, t) of a warp's 16 values: the inverse, applied to a's reads (v, t), accounts for the removals
// by the chunk's own tokens.
__device__ __forceinline__ Accumulator solve(const Accumulator& read, const PairMatrices& pairs) {
    Accumulator removed = zeros();
    multiply_finely(removed, read, load_transposed(&pairs.of[A_B][0][0], CHUNK + 8),
                    load_transposed(&pairs.low[0][0], CHUNK + 8));
    return removed;
}

// gremoved of a chunk, (v, t) of a warp's 16 values, from removed's gradients through r's reads and through dS.
__device__ __forceinline__ Accumulator solve_turned(const Accumulator& given, const PairMatrices& pairs) {
    Accumulator gremoved = zeros();
    multiply_finely(gremoved, given, load_tile(&pairs.of[A_B][0][0], CHUNK + 8),
                    load_tile(&pairs.low[0][0], CHUNK + 8));
    return gremoved;
}

// The makers' work on the first chunk: half of a block's warps make a chunk's operands ahead of the other half.
template <class Fetch, class Make, class Pair>
__device__ __forceinline__ void begin_walk(bool maker, const Fetch& start_fetch, const Make& make_operands,
                                           const Pair& make_pairs_and_fetch) {
    if (maker) {
        start_fetch(0);
        cp_async_wait_all();
    }
    __syncthreads();  // the first chunk has arrived
    if (maker) make_operands(0);
    __syncthreads();  // its operands are complete
    if (maker) make_pairs_and_fetch(0);
}
