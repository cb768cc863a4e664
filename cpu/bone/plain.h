// The two products of Bone's kernels with multiply-adds on vectors of floats.
//
// A tile of rows (tokens, or rows of a weight) is padded to `width` columns, a whole number of vectors:
//     rows    out[t] = sum_k left[t][k] matrix[k]               (a square matrix, packed)
//     outer   sum[i] += sum_t left[t][i] right[t]
#pragma once
#include <algorithm>

#include "common/products.h"
#include "common/scratch.h"
#include "common/shuffles.h"

namespace {

constexpr int kRows = 6;  // rows that a product holds in registers

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
            for (int64_t k = 0; k < whole; k += 4)
                transpose_quads(to + k * width + i, width, matrix + i * rank + k, rank);
        for (int64_t i = 0; i < rank; i++)
            for (int64_t k = i < whole ? whole : 0; k < rank; k++) to[k * width + i] = to_float(matrix[i * rank + k]);
    }

    // finish(begin, end) is called as rows begin to end of out are done.
    template <class Finish>
    void rows(float* out, const float* left, const float* packed, int64_t count, const Finish& finish) {
        multiply<Kind<false, false>, kRows>(
            Product<FloatWords>{out, width_, left, width_, packed, width_, rank_, width_}, count, finish);
    }
    void outer(float* sum, const float* left, const float* right, int64_t count) {
        multiply<Kind<true, true>, kRows>(Product<FloatWords>{sum, width_, left, width_, right, width_, count, width_},
                                          rank_, [](int64_t, int64_t) {});
    }

  private:
    int64_t rank_, width_;
};

}  // namespace
