// The chunked forward kernel. Warp i owns rows v = 16 i .. 16 i + 15 of S, in registers from the first token to the
// last; the head comment of wkv7.cu explains the algorithm.
#pragma once
#include "wkv7/chunk.cuh"

template <int N>
struct ForwardShared {
    struct { typename Shape<N>::Rows r, w, k, v, a, b; } chunk[2];  // one in use, one arriving
    Operands<N> operands;
    PairMatrices pairs;
};

template <int N>
__device__ __forceinline__ void chunked_forward(const Arguments& a) {
    constexpr int tiles = Shape<N>::tiles, stride = Shape<N>::stride;
    ForwardShared<N>& shared = *(ForwardShared<N>*)dynamic_shared();
    Operands<N>& o = shared.operands;
    PairMatrices& pairs = shared.pairs;
    const Sequence s(a);
    const int v0 = threadIdx.x / 32 * 16;  // the warp's rows

    const auto start_fetch = [&](int t0) {
        auto& next = shared.chunk[t0 / CHUNK % 2];
        fetch<N>(next.r, a.r, s, t0);
        fetch<N>(next.w, a.w, s, t0);
        fetch<N>(next.k, a.k, s, t0);
        fetch<N>(next.v, a.v, s, t0);
        fetch<N>(next.a, a.a, s, t0);
        fetch<N>(next.b, a.b, s, t0);
    };

    Accumulator S[tiles];
    load_state<N>(S, a.state ? a.state + s.state : nullptr, v0, false);
    if (s.length > 0) start_fetch(0);

    for (int t0 = 0; t0 < s.length; t0 += CHUNK) {
        const int valid = min(CHUNK, s.length - t0);
        const auto& in = shared.chunk[t0 / CHUNK % 2];
        cp_async_wait_all();
        __syncthreads();  // the chunk has arrived, and nobody reads the previous one or its operands any more
        if (t0 + CHUNK < s.length) start_fetch(t0 + CHUNK);

        const Decays<N> decays(in.w, valid, o);
        decays.reads(in.r, in.a, o);
        decays.writes(in.k, in.b, o);
        __syncthreads();  // the operands are complete

        make_pairs<N>(pairs, o);
        bf16* checkpoint = a.checkpoints ? s.chunk_state(a, t0) + v0 * N : nullptr;
        Accumulator read = zeros(), y = zeros();  // S a, (v, t); (t, v)
        #pragma unroll
        for (int b = 0; b < tiles; b++) {
            const Tile state = rounded(S[b]);
            if (checkpoint) store_tile(checkpoint + b * 16, N, 16, state);
            multiply(read, state, load_tile(&o.a[0][b * 16], stride));
            multiply(y, load_tile(&o.r[0][b * 16], stride), state);
        }
        __syncthreads();  // the pairs are complete

        const Tile v = load_transposed(&in.v[0][v0], stride);  // (v, t)
        const Tile removed = rounded(solve(read, v, pairs));
        multiply(y, load_tile(&pairs.of[R_B][0][0], CHUNK + 8), removed);
        multiply(y, load_tile(&pairs.of[R_K][0][0], CHUNK + 8), v);
        store_tile((bf16*)a.y + s.elements + t0 * s.stride + v0, s.stride, valid, rounded(y));
        #pragma unroll
        for (int b = 0; b < tiles; b++) {
            multiply(S[b], removed, load_transposed(&o.b[0][b * 16], stride));
            multiply(S[b], v, load_transposed(&o.k[0][b * 16], stride));
            scale_columns(S[b], &o.whole[b * 16]);
        }
    }
    if (a.final_state) store_state<N>(a.final_state + s.state, S, v0, false);
}
