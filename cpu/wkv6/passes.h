// The passes of backward over a tile: over the state, and over its gradient.
#pragma once
#include "common/prefetch.h"
#include "wkv6/block.h"
#include "wkv6/prepare.h"

namespace {

// quads[j], kHalf steps' quad_sums of fours of rows -> gv_j[row].
template <int N, int kRows>
INLINE void store_row_sums(float* gv, const Vec quads[kHalf][kRows / 4]) {
    UNROLL for (int a = 0; a < kRows; a += 4) {
        Vec column[kHalf];
        Quad sum[kHalf];
        UNROLL for (int j = 0; j < kHalf; j++) column[j] = quads[j][a / 4];
        sums_of_quads(column, sum);
        UNROLL for (int j = 0; j < kHalf; j++) store_quad(gv + j * N + a, sum[j]);
    }
}

// D's blocks are as wide as registers allow beside four rows: gv needs sums over lanes, which are taken in fours.
constexpr int gradient_vectors(int N) { return N / kLanes < kAccumulators / 4 ? N / kLanes : kAccumulators / 4; }

// The distance, in floats, between the saved states of two chunks.
template <int N>
constexpr int kHistoryStride = N * N + 17 * 16;

template <int N>
struct BackwardWork {
    StepRows<N, kTile> r, k, d, e;
    // so that K and P, v and gy lie in different sets of the cache in state_pass
    StepRows<N, kTile> v, K, R, P, Q, gv, gy;
    alignas(64) float W[kChunks * N], A[kChunks * kPairs], u[N];
    alignas(64) float S[N * N], D[N * N], SD[kChunks * N], gu[N];  // S and D transposed: rows values, lanes keys
    alignas(64) float padded[4][kChunk * N];
    alignas(64) float history[kChunks * kHistoryStride<N>];  // S before each chunk
};

// S^T through a tile: P_i = S gy_i, then S = W S + sum_j K_j v_j^T; history keeps S before each chunk. S after the tile
// is not stored, because the next tile's checkpoint holds it.
template <int N>
void state_pass(BackwardWork<N>& q, Range values, int chunks, Ahead& ahead) {
    using Registers = Block<N, block_rows(block_vectors(N)), block_vectors(N)>;
    const int64_t blocks = N / Registers::kLanesWide * ((values.end - values.begin) / Registers::kRowsHigh);
    for (int l = 0; l < N; l += Registers::kLanesWide)
        for (int64_t row = values.begin; row < values.end; row += Registers::kRowsHigh) {
            ahead.fetch((kTile + blocks - 1) / blocks);
            Registers S;
            S.load_from(q.S + row * N + l);
            for (int m = 0; m < chunks; m++) {
                const int chunk = m * kChunk * N;
                S.store_to(q.history + m * kHistoryStride<N> + row * N + l);
                S.read(q.gy + chunk + row, q.P + chunk + l, row == values.begin);
                S.decay_lanes(q.W + m * N + l);
                S.write(q.v + chunk + row, q.K + chunk + l);
            }
        }
}

// D^T backward through a span, its chunks by their numbers in the tile: Q_j = D v_j, gv_j = D^T K_j, SD = sum over
// values of S D, with S before the chunk and D after it, then D = W D + sum_i R_i gy_i^T.
template <int N>
void gradient_pass(BackwardWork<N>& q, Range values, Range span, Ahead& ahead) {
    using Registers = Block<N, block_rows(gradient_vectors(N)), gradient_vectors(N)>;
    constexpr int kRows = Registers::kRowsHigh, kWide = Registers::kLanesWide;
    Vec between[kSpan][kRows];  // gv's sums, kept from one block of lanes to the next, since summing lanes is dear
    for (int64_t row = values.begin; row < values.end; row += kRows)
        for (int l = 0; l < N; l += kWide) {
            ahead.fetch(1);
            const bool first = row == values.begin, first_lanes = kWide == N || l == 0, last_lanes = l + kWide == N;
            Registers D;
            D.load_from(q.D + row * N + l);
            for (int64_t m = span.end - 1; m >= span.begin; m--) {
                const int64_t chunk = m * kChunk * N;
                for (int half = 0; half < kChunk; half += kHalf) {
                    Vec quads[kHalf][kRows / 4];
                    UNROLL for (int j = 0; j < kHalf; j++) {
                        const int64_t step = chunk + (half + j) * N;
                        D.read_step(q.v + step + row, q.Q + step + l, first);
                        Vec* kept = between[(m - span.begin) * kChunk + half + j];
                        Vec sums[kRows];
                        UNROLL for (int a = 0; a < kRows; a++) sums[a] = first_lanes ? zero() : kept[a];
                        D.dot(q.K + step + l, sums, first_lanes);
                        UNROLL for (int a = 0; a < kRows; a += 4)
                            if (last_lanes) quads[j][a / 4] = quad_sums(sums[a], sums[a + 1], sums[a + 2], sums[a + 3]);
                        if (!last_lanes) UNROLL for (int a = 0; a < kRows; a++) kept[a] = sums[a];
                    }
                    if (last_lanes) store_row_sums<N, kRows>(q.gv + chunk + half * N + row, quads);
                }
                D.multiply(q.history + m * kHistoryStride<N> + row * N + l, q.SD + m * N + l, first);
                D.decay_lanes(q.W + m * N + l);
                D.write(q.gy + chunk + row, q.R + chunk + l);
            }
            D.store_to(q.D + row * N + l);
        }
}

}  // namespace
