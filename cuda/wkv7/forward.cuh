// The chunked forward kernel. Half of a block's warps, the makers, make operands and pairs of the next chunk while the
// other half takes the state through this one: without the other, either would wait for its own results most of the
// time. Warp i of the latter owns rows v = 16 i .. 16 i + 15 of S, in registers from the first token to the last. The
// head comment of wkv7.cu explains the algorithm.
#pragma once
#include "wkv7/chunk.cuh"

struct ForwardShared {
    struct {
        Shape::Rows r, w, v;
        Keys keys;
    } chunk[2];  // one in use, one arriving
    struct Made {
        Operands operands;
        PairMatrices pairs;
    } made[2];  // one in use, one in the making
};

__device__ __forceinline__ void chunked_forward(const Arguments& a) {
    constexpr int tiles = Shape::tiles, stride = Shape::stride;
    static_assert(tiles == PAIRS, "a matrix a maker");
    ForwardShared& shared = *(ForwardShared*)dynamic_shared();
    const Sequence s(a);
    if (s.length < 0) return;
    const int warp = threadIdx.x / 32;
    const bool maker = warp < tiles;
    const int v0 = warp % tiles * 16;  // the rows of a warp that is no maker

    // The makers' steps, also for chunks after the last, of zeros.
    const auto start_fetch = [&](int t0) {
        auto& next = shared.chunk[t0 / CHUNK % 2];
        fetch(next.r, a.r, s, t0);
        fetch(next.w, a.w, s, t0);
        fetch(next.v, a.v, s, t0);
        next.keys.start_fetch(a, s, t0);
    };
    const auto make_operands = [&](int t0) {
        const auto& in = shared.chunk[t0 / CHUNK % 2];
        Operands& o = shared.made[t0 / CHUNK % 2].operands;
        const Decays decays(in.w, s.length - t0, o);
        const auto share = [&](const Shape::Rows& rows) { return load_four(rows, decays.t, decays.c); };
        decays.reads(share(in.r), share(in.keys.a), o);
        decays.writes(share(in.keys.k), share(in.keys.b), o);
    };
    const auto make_pairs_and_fetch = [&](int t0) {
        auto& made = shared.made[t0 / CHUNK % 2];
        start_fetch(t0 + CHUNK);
        make_pairs(warp, made.pairs, made.operands);
        cp_async_wait_all();
    };

    Accumulator S[tiles];
    const float* start = a.group ? a.parts : a.state;
    load_state(S, start && !maker ? start + s.state : nullptr, v0, false);
    begin_walk(maker, start_fetch, make_operands, make_pairs_and_fetch);
    for (int t0 = 0; t0 < s.length; t0 += CHUNK) {
        const auto& made = shared.made[t0 / CHUNK % 2];
        const Operands& o = made.operands;
        Accumulator read = zeros(), y = zeros();  // S a, (v, t); (t, v)
        Tile v;                                   // (v, t)
        __syncthreads();  // this chunk's pairs are complete, the next has arrived, and nobody reads the previous one
        if (maker) {
            make_operands(t0 + CHUNK);
        } else {
            v = load_transposed(&shared.chunk[t0 / CHUNK % 2].v[0][v0], stride);
            bf16* checkpoint = a.checkpoints ? chunk_state(a, s, t0) + v0 * N : nullptr;
            #pragma unroll
            for (int b = 0; b < tiles; b++) {
                const Tile state = rounded(S[b]);
                if (checkpoint) store_tile(checkpoint + b * 16, N, 16, state);
                multiply(read, state, load_tile(&o.a[0][b * 16], stride));
                multiply(y, load_tile(&o.r[0][b * 16], stride), state);
            }
        }
        __syncthreads();  // the next chunk's operands are complete, and this one's tokens are read
        if (maker) {
            make_pairs_and_fetch(t0 + CHUNK);
        } else {
            multiply(read, v, load_tile(&made.pairs.of[A_K][0][0], CHUNK + 8));
            const Tile removed = rounded(solve(read, made.pairs));
            multiply(y, load_tile(&made.pairs.of[R_B][0][0], CHUNK + 8), removed);
            multiply(y, load_tile(&made.pairs.of[R_K][0][0], CHUNK + 8), v);
            bf16* to = (bf16*)a.y + s.elements + t0 * s.stride + v0;
            store_tile(to, s.stride, s.length - t0, rounded(y));
            #pragma unroll
            for (int b = 0; b < tiles; b++) {
                multiply(S[b], removed, load_transposed(&o.b[0][b * 16], stride));
                multiply(S[b], v, load_transposed(&o.k[0][b * 16], stride));
                scale_columns(S[b], &o.whole[b * 16]);
            }
        }
    }
    if (a.final_state && !a.group && !maker) store_state(a.final_state + s.state, S, v0, false);
}
