// The chunked forward kernel. Warp i owns rows v = 16 i .. 16 i + 15 of Sᵀ, in registers from the first token to the
// last; the head comment of wkv6.cu explains the algorithm.
#pragma once
#include "wkv6/chunk.cuh"

struct ForwardShared {
    struct { Shape::Rows r, k, v, w; } chunk[2];  // one in use, one arriving
    Operands operands;
    float u[N];
};

__device__ __forceinline__ void chunked_forward(const Arguments& a) {
    constexpr int tiles = Shape::tiles, stride = Shape::stride;
    ForwardShared& shared = *(ForwardShared*)dynamic_shared();
    Operands& o = shared.operands;
    const Sequence s(a);
    if (s.length < 0) return;
    const int v0 = threadIdx.x / 32 * 16;  // the warp's rows
    const int own_row = threadIdx.x / (N / 8), own_column = threadIdx.x % (N / 8) * 8;

    // The place of a thread's eight elements of the chunk that is fetched next.
    const index_t step = CHUNK * s.stride;
    index_t fetched = s.elements + own_row * s.stride + own_column;
    const auto start_fetch = [&](int t0) {
        auto& next = shared.chunk[t0 / CHUNK % 2];
        const bool valid = t0 + own_row < s.length;
        fetch(next.r, a.r, fetched, valid);
        fetch(next.k, a.k, fetched, valid);
        fetch(next.v, a.v, fetched, valid);
        fetch(next.w, a.w, fetched, valid);
        fetched += step;
    };

    if (threadIdx.x < N) shared.u[threadIdx.x] = a.u[s.channel(a) + threadIdx.x];
    Accumulator St[tiles];
    const float* start = a.group ? a.parts : a.state;
    load_state(St, start ? start + s.state : nullptr, v0, true);
    if (s.length > 0) start_fetch(0);

    for (int t0 = 0; t0 < s.length; t0 += CHUNK) {
        const int valid = min(CHUNK, s.length - t0);
        auto& in = shared.chunk[t0 / CHUNK % 2];
        cp_async_wait_all();
        __syncthreads();  // the chunk has arrived, and nobody reads the previous one or its operands any more
        if (t0 + CHUNK < s.length) start_fetch(t0 + CHUNK);
        if (a.checkpoints && t0 % SEGMENT == 0) {
            const Checkpoint checkpoint(a, s, t0);
            #pragma unroll
            for (int b = 0; b < tiles; b++) checkpoint(b, v0 / 16) = transposed(rounded(St[b]));
        }

        Decays decays(in.w, valid, o);
        const float bonus = row_dot<true>(load_eight(own(in.r)), load_eight(own(in.k)), &shared.u[own_column]);
        if (own_column == 0) o.bonus[own_row] = bonus;
        __syncthreads();  // the quarters are known
        Pair factor[4];
        decays.halves(o);
        decays.reads(factor);
        decays.scale(in.r, factor, decays.first, o.r_middle, o.r_start);
        decays.writes(factor);
        decays.scale(in.k, factor, decays.second, o.k_middle, o.k_end);
        __syncthreads();  // the operands are complete

        Accumulator scores = zeros(), y = zeros();  // (t, s), (t, v)
        #pragma unroll
        for (int b = 0; b < tiles; b++) {
            multiply(scores, load_tile(&o.r_middle[0][b * 16], stride), load_right(&o.k_middle[0][b * 16], stride));
            multiply(y, load_tile(&o.r_start[0][b * 16], stride), right(St[b]));
        }
        mask(scores, false, o.bonus);
        const Tile v = load_transposed(&in.v[0][v0], stride);  // (v, s)
        multiply(y, rounded(scores), right(v));
        store_tile((bf16*)a.y + s.elements + t0 * s.stride + v0, s.stride, valid, rounded(y));
        #pragma unroll
        for (int b = 0; b < tiles; b++) {
            scale_columns(St[b], &o.whole[b * 16]);
            multiply(St[b], v, load_right_transposed(&o.k_end[0][b * 16], stride));
        }
    }
    if (a.final_state && !a.group) store_state(a.final_state + s.state, St, v0, true);
}
