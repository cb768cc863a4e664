// States between memory, where rows are values, and the kernel, whose rows are keys; products with them.
#pragma once
#include <cstring>

#include "common/products.h"
#include "common/shuffles.h"
#include "wkv7/chunk.h"

namespace {

// rows x columns, both multiples of 4, become columns x rows.
inline void transpose(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t columns) {
    const int64_t whole = rows / kLanes * kLanes;
    for (int64_t j = 0; j < columns; j += 4) {
        for (int64_t i = 0; i < whole; i += kLanes)
            transpose_lanes(to + j * to_row + i, to_row, from + i * from_row + j, from_row);
        for (int64_t i = whole; i < rows; i += 4)
            transpose_quads(to + j * to_row + i, to_row, from + i * from_row + j, from_row);
    }
}

// An n x n state in memory <-> N x N floats, zeros beyond n; null is all zeros.
inline void load_state(float* S, int64_t N, const float* from, int64_t n) {
    if (!from || n < N) memset(S, 0, sizeof(float) * N * N);
    for (int64_t i = 0; from && i < n; i++) memcpy(S + i * N, from + i * n, sizeof(float) * n);
}
inline void load_transposed_state(float* S, int64_t N, const float* from, int64_t n) {
    if (!from || n < N) memset(S, 0, sizeof(float) * N * N);
    if (from) transpose(S, N, from, n, n, n);
}
inline void store_state(float* to, int64_t n, const float* S, int64_t N) {
    for (int64_t i = 0; i < n; i++) memcpy(to + i * n, S + i * N, sizeof(float) * n);
}

// out (rows x width) = left (rows x K) right (K x width); all side by side. After each kRows rows, `steps` steps are
// fetched of what is asked for.
template <int kRows>
void product(float* out, const float* left, const float* right, int64_t rows, int64_t K, int64_t width, Ahead& ahead,
             int steps) {
    multiply<Kind<false, false>, kRows>(Product<FloatWords>{out, width, left, K, right, width, K, width}, rows,
                                        [&](int64_t, int64_t) { ahead.fetch(steps); });
}

// out (N x N) += left^T right, of kStack rows each.
inline void add_outer(float* out, const float* left, const float* right, int64_t N) {
    multiply<Kind<true, true>, 4>(Product<FloatWords>{out, N, left, N, right, N, kStack, N}, N,
                                  [](int64_t, int64_t) {});
}

// out (kStack x kStack) = left right^T, of kStack rows each; turned: room for right^T.
inline void pair_products(float* out, const float* left, const float* right, float* turned, int64_t N, Ahead& ahead,
                          int steps) {
    transpose(turned, kStack, right, N, kStack, N);
    product<8>(out, left, turned, kStack, N, kStack, ahead, steps);
}

inline void scale_rows(float* S, const float* factors, int64_t N) {
    for (int64_t i = 0; i < N; i++)
        for (int64_t c = 0; c < N; c += kLanes) store(S + i * N + c, load(S + i * N + c) * broadcast(factors[i]));
}
inline void scale_lanes(float* S, const float* factors, int64_t N) {
    for (int64_t i = 0; i < N; i++)
        for (int64_t c = 0; c < N; c += kLanes) store(S + i * N + c, load(S + i * N + c) * load(factors + c));
}

// S after the chunk, from S before it and the chunk's uv: the writes, then all decays, which right has been divided by.
inline void advance(float* S, const Chunk& q, int64_t N) {
    add_outer(S, q.right, q.uv, N);
    scale_rows(S, q.fade(N), N);
}

}  // namespace
