// Matrices in panels, and products of them whose sums stay in registers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/prefetch.h"
#include "common/shuffles.h"

namespace {

constexpr int kPanel = 16;
constexpr int kTall = kLanes == 16 ? 8 : 4;  // rows of a product one panel wide that are summed at once

// A matrix lies in panels of kPanel columns, each with its rows one after the other: what belongs together is close
// together, and the distance from one row to the next is known to the compiler.
struct Matrix {
    float* data;
    int64_t rows;

    INLINE float* at(int64_t row, int64_t column) const {
        return data + (column / kPanel * rows + row) * kPanel + column % kPanel;
    }
    Matrix from(int64_t row) const { return {at(row, 0), rows}; }
    // Of the vectors that begin at a column, how far the next is from one.
    INLINE int64_t next_vector() const { return kLanes < kPanel ? kLanes : rows * kPanel; }
};

// The use of a product's sums: stored, or added to the present values.
struct Stored {
    static constexpr bool kAdd = false;
    template <int M, int V>
    INLINE void change(Vec (*)[M], int64_t, int64_t) const {}
};
struct Added : Stored { static constexpr bool kAdd = true; };

// M rows from m on and V vectors from column c on of out = left right, left turned or not; K is a multiple of kPanel.
// then.change<M, V>(sums, m, c) may change the sums, a vector's M rows side by side.
template <bool turned, int M, int V, class Then>
void multiply(const Matrix& out, const Matrix& left, const Matrix& right, int64_t K, int64_t m, int64_t c,
              const Then& then) {
    const int64_t right_next = right.next_vector(), out_next = out.next_vector();
    const float *l = turned ? left.at(0, m) : left.at(m, 0), *r = right.at(0, c);
    float* to = out.at(m, c);
    Vec sum[V][M];
    UNROLL for (int v = 0; v < V; v++)
        UNROLL for (int i = 0; i < M; i++) sum[v][i] = Then::kAdd ? load(to + v * out_next + i * kPanel) : zero();
    for (int64_t k = 0; k < K; k += kPanel) {
        for (int j = 0; j < kPanel; j++) {
            Vec b[V];
            UNROLL for (int v = 0; v < V; v++) b[v] = load(r + v * right_next + j * kPanel);
            UNROLL for (int i = 0; i < M; i++) {
                const Vec a = broadcast(turned ? l[j * kPanel + i] : l[i * kPanel + j]);
                UNROLL for (int v = 0; v < V; v++) sum[v][i] += a * b[v];
            }
        }
        l += turned ? kPanel * kPanel : left.rows * kPanel;
        r += kPanel * kPanel;
    }
    then.template change<M, V>(sum, m, c);
    asm("" : "+r"(to));  // its rows' addresses are computed anew, rather than kept where the loop needs registers
    UNROLL for (int v = 0; v < V; v++)
        UNROLL for (int i = 0; i < M; i++) store(to + v * out_next + i * kPanel, sum[v][i]);
}

// `rows` rows and `width` columns of out = left right, M rows at a time; after each, `steps` rows are prefetched.
template <bool turned, int M = 4, class Then>
void product(const Matrix& out, const Matrix& left, const Matrix& right, int64_t rows, int64_t K, int64_t width,
             Ahead& ahead, int steps, const Then& then) {
    constexpr int kMost = kLanes == 16 ? 16 / M : 2;  // vectors
    for (int64_t m = 0; m < rows; m += M) {
        int64_t c = 0;
        for (; c + kMost * kLanes <= width; c += kMost * kLanes)
            multiply<turned, M, kMost>(out, left, right, K, m, c, then);
        if constexpr (kMost > 2)
            for (; c + 2 * kLanes <= width; c += 2 * kLanes) multiply<turned, M, 2>(out, left, right, K, m, c, then);
        if constexpr (kLanes == kPanel)
            for (; c < width; c += kLanes) multiply<turned, M, 1>(out, left, right, K, m, c, then);
        ahead.fetch(steps);
    }
}

// rows x columns, multiples of kPanel, become columns x rows.
inline void transpose(const Matrix& to, const Matrix& from, int64_t rows, int64_t columns) {
    for (int64_t j = 0; j < columns; j += kPanel)
        for (int64_t i = 0; i < rows; i += kPanel) transpose_block(to.at(j, i), from.at(i, j));
}

}  // namespace
