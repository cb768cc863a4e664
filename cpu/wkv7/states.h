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

// A head's values of an n x n state in memory <-> W x N floats, zeros beyond; null is all zeros.
inline void load_state(float* S, int64_t N, const float* from, int64_t n, const Values& values) {
    if (!from || n < N || values.count < values.W) memset(S, 0, sizeof(float) * values.W * N);
    for (int64_t i = 0; from && i < values.count; i++)
        memcpy(S + i * N, from + (values.first + i) * n, sizeof(float) * n);
}
inline void store_state(float* to, int64_t n, const float* S, int64_t N, const Values& values) {
    for (int64_t i = 0; i < values.count; i++) memcpy(to + (values.first + i) * n, S + i * N, sizeof(float) * n);
}
// The same, turned to N x W floats.
inline void load_turned_state(float* S, int64_t N, const float* from, int64_t n, const Values& values) {
    if (!from || n < N || values.count < values.W) memset(S, 0, sizeof(float) * N * values.W);
    if (from) transpose(S, values.W, from + values.first * n, n, values.count, n);
}
// N x W floats <-> a saved state, n x n, which is turned in memory too.
inline void load_saved_state(float* S, int64_t N, const float* from, int64_t n, const Values& values) {
    if (n < N || values.count < values.W) memset(S, 0, sizeof(float) * N * values.W);
    for (int64_t i = 0; i < n; i++) memcpy(S + i * values.W, from + i * n + values.first, sizeof(float) * values.count);
}
inline void save_state(float* to, int64_t n, const float* S, const Values& values) {
    for (int64_t i = 0; i < n; i++) memcpy(to + i * n + values.first, S + i * values.W, sizeof(float) * values.count);
}

// out (rows x width) = left (rows x K) right (K x width); all side by side. After each kRows rows, `steps` steps are
// fetched of what is asked for.
template <int kRows>
void product(float* out, const float* left, const float* right, int64_t rows, int64_t K, int64_t width, Ahead& ahead,
             int steps) {
    multiply<Kind<false, false>, kRows>(Product<FloatWords>{out, width, left, K, right, width, K, width}, rows,
                                        [&](int64_t, int64_t) { ahead.fetch(steps); });
}

// out (rows x width) += left^T right, of kStack rows each.
inline void add_outer(float* out, const float* left, const float* right, int64_t rows, int64_t width) {
    multiply<Kind<true, true>, 4>(Product<FloatWords>{out, width, left, rows, right, width, kStack, width}, rows,
                                  [](int64_t, int64_t) {});
}

// out (kStack x kStack) = left right^T, of kStack rows of N each; turned: room for right^T.
inline void pair_products(float* out, const float* left, const float* right, float* turned, int64_t N, Ahead& ahead,
                          int steps) {
    transpose(turned, kStack, right, N, kStack, N);
    product<8>(out, left, turned, kStack, N, kStack, ahead, steps);
}

inline void scale_rows(float* S, const float* factors, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < width; c += kLanes)
            store(S + i * width + c, load(S + i * width + c) * broadcast(factors[i]));
}
inline void scale_lanes(float* S, const float* factors, int64_t rows, int64_t width) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < width; c += kLanes)
            store(S + i * width + c, load(S + i * width + c) * load(factors + c));
}

// S after the chunk, from S before it and the chunk's uv: the writes, then all decays, which right has been divided by.
inline void advance(float* S, const Chunk& q, int64_t N, int64_t W) {
    add_outer(S, q.right, q.uv, N, W);
    scale_rows(S, q.fade(N), N, W);
}

}  // namespace
