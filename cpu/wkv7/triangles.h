// The terms between the steps of a chunk: triangular sums and solves, a few vectors of channels at a time.
//
// Of the kStack x kStack pairs, rows are readers and columns writers: row i of the first half belongs to a_i, of
// the second to r_i; column j of the first half to b_j, of the second to k_j.
#pragma once
#include <type_traits>

#include "wkv7/chunk.h"

namespace {

// A quarter of the pairs.
struct Quarter {
    const float* pairs;
    INLINE Vec at(int i, int j) const { return broadcast(pairs[i * kPanel + j]); }
};
INLINE Quarter ab(const float* pairs) { return {pairs}; }
INLINE Quarter ak(const float* pairs) { return {pairs + kChunk}; }
INLINE Quarter qb(const float* pairs) { return {pairs + kChunk * kPanel}; }
INLINE Quarter qk(const float* pairs) { return {pairs + kChunk * kPanel + kChunk}; }

// kChunk rows of V vectors; in memory, those of a stack.
template <int V>
struct Sums {
    Vec x[kChunk][V];
    static constexpr int64_t kNext = kLanes < kPanel ? kLanes : kStack * kPanel;

    INLINE void load_rows(const float* from) {
        UNROLL for (int t = 0; t < kChunk; t++)
            UNROLL for (int v = 0; v < V; v++) x[t][v] = load(from + t * kPanel + v * kNext);
    }
    INLINE void store_rows(float* to) const {
        UNROLL for (int t = 0; t < kChunk; t++)
            UNROLL for (int v = 0; v < V; v++) store(to + t * kPanel + v * kNext, x[t][v]);
    }
    INLINE void add(int i, Vec factor, const Vec* row) {
        UNROLL for (int v = 0; v < V; v++) x[i][v] += factor * row[v];
    }

    // x_i += sum over j < i, or j <= i with the diagonal, of pairs(i, j) rows_j.
    template <bool diagonal>
    INLINE void add_earlier(Quarter pairs, const float* rows) {
        UNROLL for (int j = 0; j < kChunk; j++) {
            Vec row[V];
            UNROLL for (int v = 0; v < V; v++) row[v] = load(rows + j * kPanel + v * kNext);
            UNROLL for (int i = diagonal ? j : j + 1; i < kChunk; i++) add(i, pairs.at(i, j), row);
        }
    }
    // x_j += sum over i > j, or i >= j with the diagonal, of pairs(i, j) rows_i.
    template <bool diagonal>
    INLINE void add_later(Quarter pairs, const float* rows) {
        UNROLL for (int i = 0; i < kChunk; i++) {
            Vec row[V];
            UNROLL for (int v = 0; v < V; v++) row[v] = load(rows + i * kPanel + v * kNext);
            UNROLL for (int j = 0; j < (diagonal ? i + 1 : i); j++) add(j, pairs.at(i, j), row);
        }
    }
    // x = (I - pairs)^-1 x, and the same with the pairs turned.
    INLINE void solve(Quarter pairs) {
        UNROLL for (int j = 0; j < kChunk; j++)
            UNROLL for (int i = j + 1; i < kChunk; i++) add(i, pairs.at(i, j), x[j]);
    }
    INLINE void solve_turned(Quarter pairs) {
        UNROLL for (int i = kChunk - 1; i > 0; i--)
            UNROLL for (int j = 0; j < i; j++) add(j, pairs.at(i, j), x[i]);
    }
};

// each(c, Sums) for all vectors c of W channels, as many at once as fit in registers.
template <class Each>
INLINE void each_lanes(int64_t W, const Each& each) {
    constexpr int kWide = kLanes == 16 ? 2 : 1;
    int64_t c = 0;
    for (; c + kWide * kLanes <= W; c += kWide * kLanes) each(c, Sums<kWide>());
    if (kWide > 1 && c < W) each(c, Sums<1>());
}

// Stores V vectors from channel c on of Sums to the steps' rows in a tensor.
template <int V, class E>
INLINE void store_steps(E* rows, int64_t stride, const Sums<V>& x, int64_t steps, int64_t c, const Values& values) {
    rows += values.first;
    if (steps == kChunk && c + V * kLanes <= values.count) {
        UNROLL for (int t = 0; t < kChunk; t++)
            UNROLL for (int v = 0; v < V; v++) store(rows + t * stride + c + v * kLanes, x.x[t][v]);
    } else {
        UNROLL for (int t = 0; t < kChunk; t++)
            UNROLL for (int v = 0; v < V; v++)
                if (t < steps) store_lanes(rows + t * stride, x.x[t][v], c + v * kLanes, values.count);
    }
}

// U = (I - ab)^-1 (ak V + reads) beside V in uv, reads being a's of the state before the chunk.
inline void solve_forward(const Chunk& q, const Matrix& reads, int64_t W) {
    const float* pairs = q.pairs.data;
    each_lanes(W, [=](int64_t c, auto u) {
        float* to = q.uv.at(0, c);
        u.load_rows(reads.at(0, c));
        u.template add_earlier<false>(ak(pairs), to + kSecond);
        u.solve(ab(pairs));
        u.store_rows(to);
    });
}

// y = qk V + qb U + reads, r's of the state before the chunk.
template <class E>
void finish_forward(const Chunk& q, const Matrix& reads, E* rows, int64_t stride, int64_t steps,
                    const Values& values) {
    const float* pairs = q.pairs.data;
    each_lanes(values.W, [=](int64_t c, auto y) {
        y.load_rows(reads.at(kChunk, c));
        y.template add_earlier<true>(qb(pairs), q.uv.at(0, c));
        y.template add_earlier<true>(qk(pairs), q.uv.at(kChunk, c));
        store_steps(rows, stride, y, steps, c, values);
    });
}

// From xg's second rows, y's gradients, and from the gradients of U and V through the state after the chunk (through):
// xg's first rows, X = (I - ab)^-T (qb^T dY + through), and V's gradient.
template <class E>
void solve_backward(const Chunk& q, const Matrix& xg, const Matrix& through, E* gv, int64_t stride, int64_t steps,
                    const Values& values) {
    const float* pairs = q.pairs.data;
    each_lanes(values.W, [=](int64_t c, auto x) {
        float* to = xg.at(0, c);
        x.load_rows(through.at(0, c));
        x.template add_later<true>(qb(pairs), to + kSecond);
        x.solve_turned(ab(pairs));
        x.store_rows(to);
        x.load_rows(through.at(kChunk, c));
        x.template add_later<true>(qk(pairs), to + kSecond);
        x.template add_later<false>(ak(pairs), to);
        store_steps(gv, stride, x, steps, c, values);
    });
}

}  // namespace
