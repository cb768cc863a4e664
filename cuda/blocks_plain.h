// The two products of the block kernels with multiply-adds on vectors of floats.
//
// A tile of rows (tokens, or rows of a weight) is padded to `width` columns, a whole number of vectors:
//     rows    out[t] = sum_k left[t][k] matrix[k]               (a square matrix, packed)
//     outer   sum[i] += sum_t left[t][i] right[t]
// Accumulators lie in registers: a few rows by up to 4 vectors, which leaves the processor bound by its multiply-adds.
#pragma once
#include <algorithm>

#include "blocks_vector.h"

namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 4, kRows = 6;
#else
constexpr int kVectors = 2, kRows = 6;
#endif

// What multiply_block multiplies: floats here, pairs of bfloat16 in blocks_pairs.h.
struct FloatWords {
    using Word = float;
    using Vector = Vec;
    static INLINE Vector load(const Word* p) { return ::load(p); }
    static INLINE Vector broadcast(Word x) { return ::broadcast(x); }
    static INLINE Vec add_product(Vec sum, Vector a, Vector b) { return sum + a * b; }
};

// out[m][v] (+)= sum_k left[m * row + k * column] right[k * width + v], for M rows and V vectors.
template <int M, int V, bool kAdd, class Words>
void multiply_block(float* out, const typename Words::Word* left, int64_t row, int64_t column, const typename Words::Word* right,
                    int64_t width, int64_t K) {
    Vec sum[M][V];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < V; v++) sum[m][v] = kAdd ? load(out + m * width + v * kLanes) : Vec{};
    for (int64_t k = 0; k < K; k++) {
        typename Words::Vector b[V];
        UNROLL for (int v = 0; v < V; v++) b[v] = Words::load(right + k * width + v * kLanes);
        UNROLL for (int m = 0; m < M; m++) {
            const typename Words::Vector a = Words::broadcast(left[m * row + k * column]);
            UNROLL for (int v = 0; v < V; v++) sum[m][v] = Words::add_product(sum[m][v], a, b[v]);
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < V; v++) store(out + m * width + v * kLanes, sum[m][v]);
}

// The same for M rows and all columns.
template <int M, bool kAdd, class Words>
INLINE void multiply_rows(float* out, const typename Words::Word* left, int64_t row, int64_t column,
                          const typename Words::Word* right, int64_t width, int64_t K) {
    int64_t c = 0;
    for (; c + kVectors * kLanes <= width; c += kVectors * kLanes)
        multiply_block<M, kVectors, kAdd, Words>(out + c, left, row, column, right + c, width, K);
    for (; c + 2 * kLanes <= width; c += 2 * kLanes)
        multiply_block<M, 2, kAdd, Words>(out + c, left, row, column, right + c, width, K);
    if (c < width) multiply_block<M, 1, kAdd, Words>(out + c, left, row, column, right + c, width, K);
}

// The same for any number of rows; finish(begin, end) follows each few rows.
template <bool kAdd, class Words, class Finish>
INLINE void multiply(float* out, const typename Words::Word* left, int64_t row, int64_t column, const typename Words::Word* right,
                     int64_t width, int64_t K, int64_t rows, const Finish& finish) {
    int64_t m = 0;
    for (; m + kRows <= rows; m += kRows) {
        multiply_rows<kRows, kAdd, Words>(out + m * width, left + m * row, row, column, right, width, K);
        finish(m, m + kRows);
    }
    for (; m + 4 <= rows; m += 4) {
        multiply_rows<4, kAdd, Words>(out + m * width, left + m * row, row, column, right, width, K);
        finish(m, m + 4);
    }
    for (; m < rows; m++) {
        multiply_rows<1, kAdd, Words>(out + m * width, left + m * row, row, column, right, width, K);
        finish(m, m + 1);
    }
}

struct Plain {
    using Operand = float;
    static constexpr int64_t kTile = 64;  // rows at a time

    static int64_t width(int64_t rank) { return round_up(rank, kLanes); }
    static int64_t packed_size(int64_t rank) { return rank * width(rank); }

    explicit Plain(int64_t rank) : rank_(rank), width_(width(rank)) {}

    // matrix (rank, rank) as `rows` takes it, itself or its transpose.
    template <class E>
    static void pack(float* to, const E* matrix, int64_t rank) {
        for (int64_t k = 0; k < rank; k++)
            for (int64_t c = 0; c < width(rank); c += kLanes)
                store(to + k * width(rank) + c, load_some(matrix + k * rank + c, rank - c));
    }
    template <class E>
    static void pack_transposed(float* to, const E* matrix, int64_t rank) {
        const int64_t width = Plain::width(rank), whole = rank / 4 * 4;
        if (rank < width) std::fill(to, to + packed_size(rank), 0.0f);
        for (int64_t i = 0; i < whole; i += 4)
            for (int64_t k = 0; k < whole; k += 4) transpose_quads(to + k * width + i, width, matrix + i * rank + k, rank);
        for (int64_t i = 0; i < rank; i++)
            for (int64_t k = i < whole ? whole : 0; k < rank; k++) to[k * width + i] = to_float(matrix[i * rank + k]);
    }

    // finish(begin, end) is called as rows begin to end of out are done.
    template <class Finish>
    void rows(float* out, const float* left, const float* packed, int64_t count, const Finish& finish) {
        multiply<false, FloatWords>(out, left, width_, 1, packed, width_, rank_, count, finish);
    }
    void outer(float* sum, const float* left, const float* right, int64_t count) {
        multiply<true, FloatWords>(sum, left, 1, width_, right, width_, count, rank_, [](int64_t, int64_t) {});
    }

  private:
    int64_t rank_, width_;
};

}  // namespace
