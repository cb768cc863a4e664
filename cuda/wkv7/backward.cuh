// The chunked backward kernel. Warp i owns rows v = 16 i .. of dS, the gradient with respect to the state, in registers
// from the last token to the first, and in each chunk channels k = 16 i .. of the gradients of r, w, k, a and b; the
// head comment of wkv7.cu explains the algorithm.
#pragma once
#include "wkv7/chunk.cuh"

struct BackwardShared {
    struct Chunk {
        Shape::Rows r, w, v, gy;
        Keys keys;
    } chunk[2];                    // one in use, one arriving
    bf16 state[N][Shape::stride];  // before the chunk
    bf16 dS[N][Shape::stride];     // after it, faded by its decays
    Operands operands;
    PairMatrices pairs;  // and then, in their place, their gradients
    Shape::Rows removed, gremoved;
    float products[CHUNK + 1][N + 4];  // Decays::keep's
};

// Sums over time of a tile with time along its columns: in each row, the sum over the columns after each element's.
__device__ __forceinline__ Accumulator sums_after(const Accumulator& x) {
    const int q = lane_id() & 3;
    Accumulator sums;
    #pragma unroll
    for (int row = 0; row < 4; row += 2) {
        float above[2], total[2];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const float own = x.c[half * 4 + row] + x.c[half * 4 + row + 1];
            const float near = __shfl_xor_sync(~0u, own, 1);
            const float far = __shfl_xor_sync(~0u, own + near, 2);
            above[half] = (q & 1 ? 0.f : near) + (q & 2 ? 0.f : far);
            total[half] = own + near + far;
        }
        above[0] += total[1];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int e = half * 4 + row;
            sums.c[e + 1] = above[half];
            sums.c[e] = above[half] + x.c[e + 1];
        }
    }
    return sums;
}

// The gradients of r, w and the keys, by rows of channels: c0 .. c0 + 15, (k, t).
__device__ __forceinline__ void channel_gradients(const Arguments& a, BackwardShared& shared,
                                                  const BackwardShared::Chunk& in, int c0, index_t at, index_t row,
                                                  int valid) {
    constexpr int tiles = Shape::tiles, stride = Shape::stride;
    const int lane = lane_id();
    const Operands& o = shared.operands;
    Accumulator gr = zeros(), ga = zeros(), gk = zeros(), gb = zeros();  // of the operands
    float through[2] = {0.f, 0.f};  // of the log decays, through the state across the whole chunk or after it
    #pragma unroll
    for (int b = 0; b < tiles; b++) {
        const Tile state = load_transposed(&shared.state[b * 16][c0], stride);  // (k, v)
        const Tile dS = load_transposed(&shared.dS[b * 16][c0], stride);
        multiply(gr, state, load_tile(&in.gy[0][b * 16], stride));
        multiply(ga, state, load_tile(&shared.gremoved[0][b * 16], stride));
        multiply(gk, dS, load_tile(&in.v[0][b * 16], stride));
        multiply(gb, dS, load_tile(&shared.removed[0][b * 16], stride));
        const Accumulator before = widened(state), after = widened(dS);
        #pragma unroll
        for (int e = 0; e < 8; e++) through[e / 2 % 2] += before.c[e] * after.c[e];
    }
    const Tile r = load_transposed(&o.r[0][c0], stride), k = load_transposed(&o.k[0][c0], stride);
    const Tile a_ = load_transposed(&o.a[0][c0], stride), b_ = load_transposed(&o.b[0][c0], stride);
    const Accumulator rf = widened(r), kf = widened(k), af = widened(a_), bf = widened(b_);
    #pragma unroll
    for (int e = 0; e < 8; e++) through[e / 2 % 2] += kf.c[e] * gk.c[e] + bf.c[e] * gb.c[e];

    const auto pair = [&](PairName name) { return load_tile(&shared.pairs.of[name][0][0], CHUNK + 8); };
    const auto turned = [&](PairName name) { return load_transposed(&shared.pairs.of[name][0][0], CHUNK + 8); };
    multiply(gk, r, turned(R_K));  // in this order sm_100 spills no registers
    multiply(gk, a_, turned(A_K));
    multiply(gb, r, turned(R_B));
    multiply(gb, a_, turned(A_B));
    multiply(gr, k, pair(R_K));
    multiply(gr, b_, pair(R_B));
    multiply(ga, k, pair(A_K));
    multiply(ga, b_, pair(A_B));

    // A token's decay is in r, k and b of that token and all later ones, and in a of the later ones.
    Accumulator gw, later;
    #pragma unroll
    for (int e = 0; e < 8; e++) {
        gw.c[e] = rf.c[e] * gr.c[e] - kf.c[e] * gk.c[e] - bf.c[e] * gb.c[e];
        later.c[e] = gw.c[e] + af.c[e] * ga.c[e];
    }
    later = sums_after(later);
    #pragma unroll
    for (int half = 0; half < 2; half++) through[half] = quad_sum(through[half]);
    const Accumulator w = widened(load_transposed(&in.w[0][c0], stride));
    #pragma unroll
    for (int e = 0; e < 8; e++) {
        const int c = c0 + tile_row(lane, e), t = tile_column(lane, e);
        const float product = shared.products[t + 1][c], reciprocal = reciprocal_approx(product);
        // sigmoid(w) sigmoid(-w), in which no digits cancel
        const float small = exp2_approx(-fabsf(w.c[e]) * LOG2_E), large = reciprocal_approx(1.f + small);
        gw.c[e] = DECAY_RATE * small * large * large * (through[e / 2 % 2] + gw.c[e] + later.c[e]);
        gr.c[e] *= product;
        ga.c[e] *= shared.products[t][c];
        gk.c[e] *= reciprocal;
        gb.c[e] *= reciprocal;
    }
    store_tile((bf16*)a.gr + at, row, valid, transposed(rounded(gr)));
    store_tile((bf16*)a.gw + at, row, valid, transposed(rounded(gw)));
    store_tile((bf16*)a.gk + at, row, valid, transposed(rounded(gk)));
    store_tile((bf16*)a.ga + at, row, valid, transposed(rounded(ga)));
    store_tile((bf16*)a.gb + at, row, valid, transposed(rounded(gb)));
}

__device__ __forceinline__ void chunked_backward(const Arguments& a) {
    constexpr int tiles = Shape::tiles, stride = Shape::stride;
    BackwardShared& shared = *(BackwardShared*)dynamic_shared();
    Operands& o = shared.operands;
    PairMatrices& pairs = shared.pairs;
    const Sequence s(a);
    if (s.length < 0) return;
    const int warp = threadIdx.x / 32;
    const int v0 = warp * 16;  // the warp's rows

    const auto start_fetch = [&](int t0) {
        auto& next = shared.chunk[t0 / CHUNK % 2];
        fetch(next.r, a.r, s, t0);
        fetch(next.w, a.w, s, t0);
        fetch(next.v, a.v, s, t0);
        fetch(next.gy, a.gy, s, t0);
        next.keys.start_fetch(a, s, t0);
    };
    const auto start_fetch_of_state = [&](int t0) {
        const bf16* source = chunk_state(a, s, t0);
        #pragma unroll
        for (int i = 0; i < N / 16; i++) {
            const int row = i * 16 + threadIdx.x / (N / 8), column = threadIdx.x % (N / 8) * 8;
            cp_async_16(&shared.state[row][column], source + row * N + column, true);
        }
    };

    Accumulator dS[tiles];
    const float* end = a.group ? a.parts : a.gfinal;
    load_state(dS, end ? end + s.state : nullptr, v0, false);
    const int last = (s.length - 1) / CHUNK * CHUNK;
    if (s.length > 0) start_fetch(last);

    for (int t0 = last; t0 >= 0 && s.length > 0; t0 -= CHUNK) {
        const int valid = min(CHUNK, s.length - t0);
        auto& in = shared.chunk[t0 / CHUNK % 2];
        const index_t at = s.elements + t0 * s.stride + v0;
        cp_async_wait_all();
        __syncthreads();  // the chunk has arrived, and nobody reads the later one, its state or its operands any more
        start_fetch_of_state(t0);
        const Decays decays(in.w, valid, o);
        const auto share = [&](const Shape::Rows& rows) { return load_four(rows, decays.t, decays.c); };
        decays.reads(share(in.r), share(in.keys.a), o);
        decays.writes(share(in.keys.k), share(in.keys.b), o);
        decays.keep(shared.products);
        cp_async_wait_all();
        __syncthreads();  // the operands are complete, and the state has arrived
        if (t0 > 0) start_fetch(t0 - CHUNK);

        make_pairs(warp, pairs, o);
        Accumulator read = zeros(), given = zeros(), gv = zeros();  // S a, (v, t); to removed, (v, t); (t, v)
        #pragma unroll
        for (int b = 0; b < tiles; b++) {
            scale_columns(dS[b], &o.whole[b * 16]);
            const Tile faded = rounded(dS[b]);
            multiply(read, load_tile(&shared.state[v0][b * 16], stride), load_tile(&o.a[0][b * 16], stride));
            multiply(given, faded, load_tile(&o.b[0][b * 16], stride));
            multiply(gv, load_tile(&o.k[0][b * 16], stride), faded);
        }
        #pragma unroll
        for (int b = 0; b < tiles; b++) store_tile(&shared.dS[v0][b * 16], stride, 16, rounded(dS[b]));
        __syncthreads();  // the pairs are complete

        const Tile v = load_transposed(&in.v[0][v0], stride), gy = load_transposed(&in.gy[0][v0], stride);  // (v, t)
        multiply(read, v, load_tile(&pairs.of[A_K][0][0], CHUNK + 8));
        store_tile(&shared.removed[0][v0], stride, CHUNK, transposed(rounded(solve(read, pairs))));
        multiply(given, gy, load_transposed(&pairs.of[R_B][0][0], CHUNK + 8));
        const Tile gremoved = rounded(solve_turned(given, pairs));
        store_tile(&shared.gremoved[0][v0], stride, CHUNK, transposed(gremoved));
        multiply(gv, load_transposed(&pairs.of[R_K][0][0], CHUNK + 8), gy);
        multiply(gv, load_transposed(&pairs.of[A_K][0][0], CHUNK + 8), gremoved);
        store_tile((bf16*)a.gv + at, s.stride, valid, rounded(gv));
        #pragma unroll
        for (int b = 0; b < tiles; b++) {
            multiply(dS[b], gy, load_transposed(&o.r[0][b * 16], stride));
            multiply(dS[b], gremoved, load_transposed(&o.a[0][b * 16], stride));
        }
        __syncthreads();  // removed and its gradient are complete, and nobody reads the pairs any more

        Accumulator gpairs = pair_product(warp, shared.gremoved, in.gy, shared.removed, in.v);
        keep_earlier(warp, gpairs);
        store_tile(&pairs.of[warp][0][0], CHUNK + 8, CHUNK, rounded(gpairs));
        __syncthreads();  // the pairs' gradients are complete
        channel_gradients(a, shared, in, v0, at, s.stride, valid);
    }
    if (a.gstate && !a.group) store_state(a.gstate + s.state, dS, v0, false);
}
