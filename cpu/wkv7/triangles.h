// What happens between the steps of a chunk: triangular sums and solves, a vector of channels at a time.
//
// Of the kStack x kStack pairs, rows are readers and columns writers: row i of the first half belongs to a_i, of the
// second to r_i; column j of the first half to b_j, of the second to k_j.
#pragma once
#include "wkv7/chunk.h"

namespace {

// A quarter of the pairs.
struct Quarter {
    const float* pairs;
    INLINE Vec at(int i, int j) const { return broadcast(pairs[i * kStack + j]); }
};
INLINE Quarter ab(const float* pairs) { return {pairs}; }
INLINE Quarter ak(const float* pairs) { return {pairs + kChunk}; }
INLINE Quarter qb(const float* pairs) { return {pairs + kChunk * kStack}; }
INLINE Quarter qk(const float* pairs) { return {pairs + kChunk * kStack + kChunk}; }

// sum[i] += sum over j < i, or j <= i with the diagonal, of pairs(i, j) x_j; x's rows are N apart.
template <bool diagonal>
INLINE void add_earlier(Vec* sum, Quarter pairs, const float* x, int64_t N) {
    UNROLL for (int j = 0; j < kChunk; j++) {
        const Vec xj = load(x + j * N);
        UNROLL for (int i = diagonal ? j : j + 1; i < kChunk; i++) sum[i] += pairs.at(i, j) * xj;
    }
}

// sum[j] += sum over i > j, or i >= j with the diagonal, of pairs(i, j) x_i.
template <bool diagonal>
INLINE void add_later(Vec* sum, Quarter pairs, const float* x, int64_t N) {
    UNROLL for (int i = 0; i < kChunk; i++) {
        const Vec xi = load(x + i * N);
        UNROLL for (int j = 0; j < (diagonal ? i + 1 : i); j++) sum[j] += pairs.at(i, j) * xi;
    }
}

INLINE void load_rows(Vec* x, const float* from, int64_t N) {
    UNROLL for (int t = 0; t < kChunk; t++) x[t] = load(from + t * N);
}
INLINE void store_rows(float* to, const Vec* x, int64_t N) {
    UNROLL for (int t = 0; t < kChunk; t++) store(to + t * N, x[t]);
}

// uv's first half, U = (I - ab)^-1 (ak V + reads), reads being a's of the state before the chunk.
inline void solve_forward(const Chunk& q, const float* reads, int64_t W) {
    for (int64_t c = 0; c < W; c += kLanes) {
        Vec u[kChunk];
        load_rows(u, reads + c, W);
        add_earlier<false>(u, ak(q.pairs), q.uv + kChunk * W + c, W);
        UNROLL for (int j = 0; j < kChunk; j++)
            UNROLL for (int i = j + 1; i < kChunk; i++) u[i] += ab(q.pairs).at(i, j) * u[j];
        store_rows(q.uv + c, u, W);
    }
}

// y = qk V + qb U + reads, r's of the state before the chunk; written over these.
inline void finish_forward(const Chunk& q, float* reads, int64_t W) {
    for (int64_t c = 0; c < W; c += kLanes) {
        Vec y[kChunk];
        load_rows(y, reads + c, W);
        add_earlier<true>(y, qb(q.pairs), q.uv + c, W);
        add_earlier<true>(y, qk(q.pairs), q.uv + kChunk * W + c, W);
        store_rows(reads + c, y, W);
    }
}

// From xg's second half, y's gradients, and what reaches U and V by way of the state after the chunk (through): xg's
// first half, X = (I - ab)^-T (qb^T dY + through), and V's gradient in place of through's second half.
inline void solve_backward(const Chunk& q, float* xg, float* through, int64_t W) {
    for (int64_t c = 0; c < W; c += kLanes) {
        float *X = xg + c, *gv = through + kChunk * W + c;
        const float* gy = xg + kChunk * W + c;
        Vec x[kChunk];
        load_rows(x, through + c, W);
        add_later<true>(x, qb(q.pairs), gy, W);
        UNROLL for (int i = kChunk - 1; i > 0; i--)
            UNROLL for (int j = 0; j < i; j++) x[j] += ab(q.pairs).at(i, j) * x[i];
        store_rows(X, x, W);
        load_rows(x, gv, W);
        add_later<true>(x, qk(q.pairs), gy, W);
        add_later<false>(x, ak(q.pairs), X, W);
        store_rows(gv, x, W);
    }
}

// reads += the pairs' gradients times right; writes += these turned, times left: then they are left's and right's
// gradients.
inline void finish_backward(const Chunk& q, const float* gpairs, float* reads, float* writes, int64_t N) {
    const int64_t second = kChunk * N;
    for (int64_t c = 0; c < N; c += kLanes) {
        Vec x[kChunk];
        load_rows(x, reads + c, N);
        add_earlier<false>(x, ab(gpairs), q.right + c, N);
        add_earlier<false>(x, ak(gpairs), q.right + second + c, N);
        store_rows(reads + c, x, N);
        load_rows(x, reads + second + c, N);
        add_earlier<true>(x, qb(gpairs), q.right + c, N);
        add_earlier<true>(x, qk(gpairs), q.right + second + c, N);
        store_rows(reads + second + c, x, N);
        load_rows(x, writes + c, N);
        add_later<false>(x, ab(gpairs), q.left + c, N);
        add_later<true>(x, qb(gpairs), q.left + second + c, N);
        store_rows(writes + c, x, N);
        load_rows(x, writes + second + c, N);
        add_later<false>(x, ak(gpairs), q.left + c, N);
        add_later<true>(x, qk(gpairs), q.left + second + c, N);
        store_rows(writes + second + c, x, N);
    }
}

}  // namespace
