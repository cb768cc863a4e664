// Copies states between memory, where rows are values, and the kernel, where rows are keys; products with them.
#pragma once
#include <cstring>

#include "wkv7/chunk.h"

namespace {

// A head's values of an n x n state in memory <-> N x W, zeros beyond; null is all zeros.
inline void load_state(const Matrix& S, int64_t N, const float* from, int64_t n, const Values& values) {
    if (!from || n < N || values.count < values.W) memset(S.data, 0, sizeof(float) * S.rows * values.W);
    if (!from) return;
    from += values.first * n;
    int64_t i = 0;
    for (; i + kLanes <= values.count; i += kLanes)
        for (int64_t c = 0; c < n; c += 4) transpose_lanes(S.at(c, i), kPanel, from + i * n + c, n);
    for (; i < values.count; i += 4)
        for (int64_t c = 0; c < n; c += 4) transpose_quads(S.at(c, i), kPanel, from + i * n + c, n);
}
inline void store_state(float* to, int64_t n, const Matrix& S, const Values& values) {
    to += values.first * n;
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes)
        for (int64_t i = 0; i < values.count; i += 4) transpose_lanes(to + i * n + c, n, S.at(c, i), kPanel);
    for (; c < n; c += 4)
        for (int64_t i = 0; i < values.count; i += 4) transpose_quads(to + i * n + c, n, S.at(c, i), kPanel);
}

// N x W <-> a saved state, n x n, which is turned in memory too.
inline void load_saved_state(const Matrix& S, int64_t N, const float* from, int64_t n, const Values& values) {
    if (n < N || values.count < values.W) memset(S.data, 0, sizeof(float) * S.rows * values.W);
    for (int64_t c = 0; c < values.count; c += kPanel)
        for (int64_t i = 0; i < n; i++)
            memcpy(S.at(i, c), from + i * n + values.first + c,
                   sizeof(float) * std::min<int64_t>(kPanel, values.count - c));
}
inline void save_state(float* to, int64_t n, const Matrix& S, const Values& values) {
    for (int64_t c = 0; c < values.count; c += kPanel)
        for (int64_t i = 0; i < n; i++)
            memcpy(to + i * n + values.first + c, S.at(i, c),
                   sizeof(float) * std::min<int64_t>(kPanel, values.count - c));
}

// left right^T; turned becomes right^T.
inline void pair_products(const Chunk& q, const Matrix& turned, int64_t N, Ahead& ahead) {
    transpose(turned, q.right, kStack, N);
    product<false, kTall>(q.pairs, q.left, turned, kStack, N, kStack, ahead, 3, Stored());
}

// Adds the writes to a state, and fades it.
struct Advanced : Stored {
    const Matrix S, fade;
    Advanced(const Matrix& S, const Matrix& fade) : S(S), fade(fade) {}
    template <int M, int V>
    INLINE void change(Vec (*sum)[M], int64_t m, int64_t c) const {
        const float *before = S.at(m, c), *factors = fade.at(0, m);
        const int64_t next = S.next_vector();
        UNROLL for (int i = 0; i < M; i++) {
            const Vec factor = broadcast(factors[i]);
            UNROLL for (int v = 0; v < V; v++)
                sum[v][i] = (load(before + v * next + i * kPanel) + sum[v][i]) * factor;
        }
    }
};

// The state after the chunk, from that before it, its uv and right^T: the writes, then all decays, which right has been
// divided by.
inline void advance(const Matrix& after, const Chunk& q, const Matrix& turned, int64_t N, int64_t W, Ahead& ahead) {
    product<false>(after, turned, q.uv, N, kStack, W, ahead, 3, Advanced(q.S, q.fade()));
}

}  // namespace
