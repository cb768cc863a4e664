// The chunked backward kernel. Warp i owns rows k = 16 i .. of dS, the gradient with respect to the state, and rows
// v = 16 i .. of dSᵀ, both in registers from the last token to the first; the head comment of wkv6.cu explains
// the algorithm.
#pragma once
#include "wkv6/chunk.cuh"

struct BackwardShared {
    struct { Shape::Rows r, k, v, w, gy; } chunk[2];  // one in use, one arriving
    // Of a chunk; between two segments the place is free.
    struct {
        Operands operands;
        float read[CHUNK][N + 4], write[CHUNK][N + 4];  // Decays::reads and writes, for the epilogue
    } made;
    float u[N], gy_v[CHUNK];  // gy_v: sum over v of gy v
};

// Sums over time of a tile with time along its columns: in each row, the sum over the columns before each element's
// (exclusive), or after it.
struct RowSums { Accumulator before, after; };
__device__ __forceinline__ RowSums row_sums(const Accumulator& x) {
    const int q = lane_id() & 3;
    RowSums sums;
    #pragma unroll
    for (int row = 0; row < 4; row += 2) {
        float below[2], above[2], total[2];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const float own = x.c[half * 4 + row] + x.c[half * 4 + row + 1];
            const float near = __shfl_xor_sync(~0u, own, 1);
            const float far = __shfl_xor_sync(~0u, own + near, 2);
            below[half] = (q & 1 ? near : 0.f) + (q & 2 ? far : 0.f);
            above[half] = (q & 1 ? 0.f : near) + (q & 2 ? 0.f : far);
            total[half] = own + near + far;
        }
        below[1] += total[0];
        above[0] += total[1];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int e = half * 4 + row;
            sums.before.c[e] = below[half];
            sums.before.c[e + 1] = below[half] + x.c[e];
            sums.after.c[e + 1] = above[half];
            sums.after.c[e] = above[half] + x.c[e + 1];
        }
    }
    return sums;
}

__device__ __forceinline__ void chunked_backward(const Arguments& a) {
    constexpr int tiles = Shape::tiles, stride = Shape::stride;
    BackwardShared& shared = *(BackwardShared*)dynamic_shared();
    Operands& o = shared.made.operands;
    const Sequence s(a);
    const int tid = threadIdx.x, lane = lane_id();
    if (s.length < 0) {  // no group has this place
        if (tid < N) a.gu[s.channels + tid] = 0.f;
        return;
    }
    const int c0 = tid / 32 * 16;  // the warp's rows
    const int own_row = tid / (N / 8), own_column = tid % (N / 8) * 8;
    const int segments = (s.length + SEGMENT - 1) / SEGMENT;
    int stage = 0;  // shared.chunk[stage] is in use

    // Backward visits each chunk but a segment's last twice: forward, to rebuild the states, then in reverse.
    const auto start_fetch = [&](int into, int t0, bool reverse) {
        auto& next = shared.chunk[into];
        fetch(next.k, a.k, s, t0);
        fetch(next.v, a.v, s, t0);
        fetch(next.w, a.w, s, t0);
        if (reverse) {
            fetch(next.r, a.r, s, t0);
            fetch(next.gy, a.gy, s, t0);
        }
    };
    const auto arrive = [&]() {  // at the chunk whose fetch was started last
        cp_async_wait_all();
        __syncthreads();  // the chunk has arrived, and nobody reads the previous one or its operands any more
        stage ^= 1;
    };

    // The states inside a segment are stored in memory that is still unused: the place of the gradients of the chunk
    // before, which are written after the last read. Tile b of the thread, of the state after the chunk at token t0.
    static_assert(tiles <= 4, "a gradient for each tile");
    const auto waiting = [&](int t0, int b) -> Tile& {
        void* const room = b == 0 ? a.gr : b == 1 ? a.gk : b == 2 ? a.gv : a.gw;
        return *(Tile*)((bf16*)room + s.elements + (t0 + own_row) * s.stride + own_column);
    };

    if (tid < N) shared.u[tid] = a.u[s.channel(a) + tid];
    const float* ends = a.group ? a.parts : a.gfinal;
    const float* end = ends ? ends + s.state : nullptr;
    Accumulator dS[tiles], dSt[tiles];
    load_state(dS, end, c0, false);
    load_state(dSt, end, c0, true);
    float gu[2] = {0.f, 0.f};
    if (segments > 0) start_fetch(1, (segments - 1) * SEGMENT, s.length - (segments - 1) * SEGMENT <= CHUNK);

    for (int segment = segments - 1; segment >= 0; segment--) {
        const int begin = segment * SEGMENT;
        const int chunks = min(CHUNKS, (s.length - begin + CHUNK - 1) / CHUNK);
        Accumulator S[tiles];
        const Checkpoint checkpoint(a, s, begin);
        #pragma unroll
        for (int b = 0; b < tiles; b++) S[b] = widened(checkpoint(c0 / 16, b));
        for (int i = 0; i < chunks - 1; i++) {
            arrive();
            start_fetch(stage ^ 1, begin + (i + 1) * CHUNK, i + 1 == chunks - 1);
            const auto& in = shared.chunk[stage];
            Decays decays(in.w, CHUNK, o);
            __syncthreads();  // the quarters are known
            Pair factor[4];
            decays.halves(o);
            decays.ends(factor);
            decays.scale(in.k, factor, o.k_end);
            __syncthreads();  // the operand is complete

            const Tile k_end = load_transposed(&o.k_end[0][c0], stride);  // (k, s)
            #pragma unroll
            for (int b = 0; b < tiles; b++) {
                scale_rows(S[b], &o.whole[c0]);
                multiply(S[b], k_end, load_right_transposed(&in.v[0][b * 16], stride));
                waiting(begin + i * CHUNK, b) = rounded(S[b]);
            }
        }

        for (int i = chunks - 1; i >= 0; i--) {
            const int t0 = begin + i * CHUNK, valid = min(CHUNK, s.length - t0);
            arrive();
            if (i > 0)
                start_fetch(stage ^ 1, t0 - CHUNK, true);
            else if (segment > 0)
                start_fetch(stage ^ 1, begin - SEGMENT, false);
            auto& in = shared.chunk[stage];

            Decays decays(in.w, valid, o);
            const float bonus = row_dot<true>(load_eight(own(in.r)), load_eight(own(in.k)), &shared.u[own_column]);
            const float gy_v = row_dot<false>(load_eight(own(in.gy)), load_eight(own(in.v)));
            if (own_column == 0) {
                o.bonus[own_row] = bonus;
                shared.gy_v[own_row] = gy_v;
            }
            __syncthreads();  // the quarters are known
            Pair factor[4];
            decays.halves(o);
            decays.reads(factor);
            decays.scale(in.r, factor, decays.first, o.r_middle, o.r_start);
            decays.keep(factor, shared.made.read);
            decays.writes(factor);
            decays.scale(in.k, factor, decays.second, o.k_middle, o.k_end);
            decays.keep(factor, shared.made.write);
            __syncthreads();  // the operands are complete

            // The state before the chunk comes from global memory: start its copy early.
            Tile states[tiles];
            #pragma unroll
            for (int b = 0; b < tiles; b++) states[b] = i > 0 ? waiting(t0 - CHUNK, b) : checkpoint(c0 / 16, b);

            // gv = scoresᵀ gy + k_end dS, by rows of time; each warp its 16 columns v.
            Accumulator scores_t = zeros(), gv = zeros();  // (s, t), (s, v)
            #pragma unroll
            for (int b = 0; b < tiles; b++) {
                multiply(scores_t, load_tile(&o.k_middle[0][b * 16], stride),
                         load_right(&o.r_middle[0][b * 16], stride));
                multiply(gv, load_tile(&o.k_end[0][b * 16], stride), right(dSt[b]));
            }
            mask(scores_t, true, o.bonus);
            const Tile gy_t = load_transposed(&in.gy[0][c0], stride);  // (v, t)
            multiply(gv, rounded(scores_t), right(gy_t));
            store_tile((bf16*)a.gv + s.elements + t0 * s.stride + c0, s.stride, valid, rounded(gv));

            // The rest by rows of channels; each warp its 16 rows k. "across": through the state at the chunk's start
            // or end. "inside": between two tokens of the chunk.
            Accumulator gscores = zeros();                         // (t, s)
            Accumulator gr_across = zeros(), gk_across = zeros();  // (k, t), (k, s)
            float state_gradient[2] = {0.f, 0.f};                  // <S before the chunk, dS after it>
            #pragma unroll
            for (int b = 0; b < tiles; b++) {
                const Tile gy = load_tile(&in.gy[0][b * 16], stride);
                const Right v = load_right(&in.v[0][b * 16], stride);
                multiply(gscores, gy, v);
                multiply(gk_across, rounded(dS[b]), v);
            }
            #pragma unroll
            for (int b = 0; b < tiles; b++) {
                multiply(gr_across, states[b], load_right(&in.gy[0][b * 16], stride));
                const Accumulator before = widened(states[b]);
                #pragma unroll
                for (int e = 0; e < 8; e++) state_gradient[e / 2 % 2] += before.c[e] * dS[b].c[e];
            }
            mask(gscores, false, nullptr);
            const Tile gscores_rounded = rounded(gscores);
            const Tile r_middle = load_transposed(&o.r_middle[0][c0], stride);  // (k, t)
            const Tile k_middle = load_transposed(&o.k_middle[0][c0], stride);  // (k, s)
            Accumulator gr_inside = zeros(), gk_inside = zeros();
            multiply(gr_inside, k_middle, right(gscores_rounded));
            multiply(gk_inside, r_middle, right(transposed(gscores_rounded)));

            // dS = dS * whole + r_startᵀ gy
            const Tile r_start = load_transposed(&o.r_start[0][c0], stride);  // (k, t)
            #pragma unroll
            for (int b = 0; b < tiles; b++) {
                scale_columns(dSt[b], &o.whole[b * 16]);
                multiply(dSt[b], gy_t, load_right_transposed(&o.r_start[0][b * 16], stride));
                scale_rows(dS[b], &o.whole[c0]);
                multiply(dS[b], r_start, load_right_transposed(&in.gy[0][b * 16], stride));
            }

            // Epilogue, element by element over the (k, t) tile: the gradients, and the four sums that make up gw.
            const Accumulator r = widened(load_transposed(&in.r[0][c0], stride));
            const Accumulator k = widened(load_transposed(&in.k[0][c0], stride));
            const Accumulator w = widened(load_transposed(&in.w[0][c0], stride));
            const Accumulator rm = widened(r_middle), km = widened(k_middle);
            Accumulator gr, gk, gw, k_across, k_inside, difference;
            #pragma unroll
            for (int e = 0; e < 8; e++) {
                const int c = c0 + tile_row(lane, e), t = tile_column(lane, e);
                const float read = shared.made.read[t][c], write = shared.made.write[t][c];
                const float through_u = shared.u[c] * shared.gy_v[t];
                const float across_r = gr_across.c[e] * read * o.first[c];
                const float across_k = gk_across.c[e] * write * o.second[c];
                gr.c[e] = across_r + gr_inside.c[e] * read + k.c[e] * through_u;
                gk.c[e] = across_k + gk_inside.c[e] * write + r.c[e] * through_u;
                gu[e / 2 % 2] += r.c[e] * k.c[e] * shared.gy_v[t];
                k_across.c[e] = k.c[e] * across_k;
                k_inside.c[e] = km.c[e] * gk_inside.c[e];
                difference.c[e] = r.c[e] * across_r + (rm.c[e] * gr_inside.c[e] - k_inside.c[e]);
            }
            const RowSums past = row_sums(k_across), future = row_sums(difference);
            #pragma unroll
            for (int half = 0; half < 2; half++)
                state_gradient[half] = quad_sum(state_gradient[half]) * o.whole[c0 + lane / 4 + half * 8];
            #pragma unroll
            for (int e = 0; e < 8; e++) {
                const float x = log2_decay(w.c[e]);
                const float glog = state_gradient[e / 2 % 2] + past.before.c[e] + (future.after.c[e] - k_inside.c[e]);
                gw.c[e] = x == DECAY_CAP ? 0.f : -x * LN_2 * glog;
            }
            const index_t at = s.elements + t0 * s.stride + c0;
            store_tile((bf16*)a.gr + at, s.stride, valid, transposed(rounded(gr)));
            store_tile((bf16*)a.gk + at, s.stride, valid, transposed(rounded(gk)));
            store_tile((bf16*)a.gw + at, s.stride, valid, transposed(rounded(gw)));
        }
    }

    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const float sum = quad_sum(gu[half]);
        if (lane % 4 == 0) a.gu[s.channels + c0 + lane / 4 + half * 8] = sum;
    }
    if (a.gstate && !a.group) store_state(a.gstate + s.state, dS, c0, false);
}
