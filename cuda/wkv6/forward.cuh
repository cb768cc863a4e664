// The chunked forward kernel. Warp i owns rows v = 16 i .. 16 i + 15 of Sᵀ, in registers from the first token to the
// last; the head comment of wkv6.cu explains the algorithm.
#pragma once
#include "wkv6/decay.cuh"
#include "wkv6/gate.cuh"

// R: the decay's rank where it is made here, or 0 where w is given.
template <int N, bool GATED, int R = 0>
struct ForwardShared {
    struct { typename Shape<N>::Rows r, k, v, w; } chunk[2];  // one in use, one arriving
    Operands<N> operands;
    float u[N];
    GateShared<N, GATED> gate;
    DecayShared<R> decay;
};

template <int N, bool GATED, int R = 0>
__device__ __forceinline__ void chunked_forward(const Arguments& a) {
    constexpr int tiles = Shape<N>::tiles, stride = Shape<N>::stride;
    ForwardShared<N, GATED, R>& shared = *(ForwardShared<N, GATED, R>*)dynamic_shared();
    Operands<N>& o = shared.operands;
    const Sequence s(a);
    if (s.length < 0) return;
    const int v0 = threadIdx.x / 32 * 16;  // the warp's rows
    const int own_row = threadIdx.x / (N / 8), own_column = threadIdx.x % (N / 8) * 8;

    // Where a thread's eight elements lie of the chunk that is fetched next, and of the one that is finished next.
    const index_t step = CHUNK * s.stride;
    index_t fetched = s.elements + own_row * s.stride + own_column, finished = fetched - step;
    const auto start_fetch = [&](int t0) {
        auto& next = shared.chunk[t0 / CHUNK % 2];
        const bool valid = t0 + own_row < s.length;
        fetch<N>(next.r, a.r, fetched, valid);
        fetch<N>(next.k, a.k, fetched, valid);
        fetch<N>(next.v, a.v, fetched, valid);
        if (!R) fetch<N>(next.w, a.w, fetched, valid);
        fetched += step;
    };
    const auto start_low_fetch = [&](int t0) {
        if constexpr (R > 0)
            if (t0 < s.length)
                fetch_rows<R>(shared.decay.low[t0 / CHUNK % 2], (const bf16*)a.low + (s.token + t0) * R, R, CHUNK,
                              s.length - t0);
    };

    // Writes the results of the chunk at t0, of whose y each warp has its part in shared memory.
    const auto finish = [&](const GateRows& rows, int t0) {
        if constexpr (GATED) {
            const Tile out = gated<N>(rows, shared.gate, a.eps);
            const bool valid = t0 >= 0 && t0 + own_row < s.length;
            if (valid) store_eight((bf16*)a.y + finished, rows.y);
            if (valid) store_eight((bf16*)a.out + finished, out);
            finished += step;
        }
    };

    if constexpr (GATED) load_parameters(shared.gate, a, s);
    if (threadIdx.x < N) shared.u[threadIdx.x] = a.u[s.channel(a) + threadIdx.x];
    Accumulator St[tiles];
    const float* start = a.group ? a.parts : a.state;
    load_state<N>(St, start ? start + s.state : nullptr, v0, true);
    start_low_fetch(0);
    start_low_fetch(CHUNK);
    const DecayFactors<N, R> factors(a, s, v0);
    // Step b of the decay of the chunk at t0; and where that goes, each warp's part.
    const auto decay_step = [&](Accumulator& product, int t0, int b) {
        if constexpr (R > 0) factors.step(product, shared.decay.low[t0 / CHUNK % 2], b);
    };
    const auto put_decay = [&](const Accumulator& product, int t0) {
        if constexpr (R > 0) factors.put(&shared.chunk[t0 / CHUNK % 2].w[0][v0], stride, product);
    };
    if constexpr (R > 0) {
        cp_async_wait_all();
        __syncthreads();  // the first two chunks' low have arrived
        Accumulator w = zeros();
        #pragma unroll
        for (int b = 0; b < tiles; b++) decay_step(w, 0, b);
        put_decay(w, 0);
    }
    if (s.length > 0) start_fetch(0);

    for (int t0 = 0; t0 < s.length; t0 += CHUNK) {
        const int valid = min(CHUNK, s.length - t0);
        auto& in = shared.chunk[t0 / CHUNK % 2];
        cp_async_wait_all();
        __syncthreads();  // the chunk has arrived, and nobody reads the previous one or its operands any more
        const GateRows before = own_rows(shared.gate);
        if (t0 + CHUNK < s.length) start_fetch(t0 + CHUNK);
        start_low_fetch(t0 + 2 * CHUNK);
        if constexpr (GATED) fetch<N>(shared.gate.g, a.g, finished + step, t0 + own_row < s.length);
        if (a.checkpoints && t0 % SEGMENT == 0) {
            const Checkpoint<N> checkpoint(a, s, t0);
            #pragma unroll
            for (int b = 0; b < tiles; b++) checkpoint(b, v0 / 16) = transposed(rounded(St[b]));
        }

        Decays<N> decays(in.w, valid, o);
        const float bonus = row_dot<N, true>(load_eight(own<N>(in.r)), load_eight(own<N>(in.k)), &shared.u[own_column]);
        finish(before, t0 - CHUNK);  // a chunk late, where no barrier has to wait for its y
        if (own_column == 0) o.bonus[own_row] = bonus;
        __syncthreads();  // the quarters are known
        Pair factor[4];
        decays.halves(o);
        decays.reads(factor);
        decays.scale(in.r, factor, decays.first, o.r_middle, o.r_start);
        decays.writes(factor);
        decays.scale(in.k, factor, decays.second, o.k_middle, o.k_end);
        __syncthreads();  // the operands are complete

        Accumulator scores = zeros(), y = zeros(), w = zeros();  // (t, s), (t, v), (t, c) of the next chunk
        #pragma unroll
        for (int b = 0; b < tiles; b++) {
            multiply(scores, load_tile(&o.r_middle[0][b * 16], stride), load_right(&o.k_middle[0][b * 16], stride));
            multiply(y, load_tile(&o.r_start[0][b * 16], stride), right(St[b]));
            decay_step(w, t0 + CHUNK, b);  // a chunk ahead, where it fills the time that the others take
        }
        mask(scores, false, o.bonus);
        const Tile v = load_transposed(&in.v[0][v0], stride);  // (v, s)
        multiply(y, rounded(scores), right(v));
        if constexpr (GATED)
            store_tile(&shared.gate.y[0][v0], stride, CHUNK, rounded(y));
        else
            store_tile((bf16*)a.y + s.elements + t0 * s.stride + v0, s.stride, valid, rounded(y));
        #pragma unroll
        for (int b = 0; b < tiles; b++) {
            scale_columns(St[b], &o.whole[b * 16]);
            multiply(St[b], v, load_right_transposed(&o.k_end[0][b * 16], stride));
        }
        put_decay(w, t0 + CHUNK);
    }
    if (GATED && s.length > 0) {
        cp_async_wait_all();
        __syncthreads();  // the last chunk's y is complete
        finish(own_rows(shared.gate), (s.length - 1) / CHUNK * CHUNK);
    }
    if (a.final_state && !a.group) store_state<N>(a.final_state + s.state, St, v0, true);
}
