// The two products of Bone's kernels with multiply-adds on vectors of floats.
//
// A tile of rows (tokens, or rows of a weight) is padded to `width` columns, a whole number of vectors:
//     rows    take(t, c, 16 columns from c on of sum_k left[t][k] matrix[k])    (a square matrix, packed)
//     outer   sum[i] += sum_t left[t][i] right[t]
#pragma once
#include <algorithm>

#include "bone/tile.h"
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

    static bool reads_in_place(int64_t rank, int64_t) { return rank % kLanes == 0; }

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

    template <class Take>
    void rows(Rows<const float> left, const float* packed, int64_t count, const Take& take) {
        const Product<FloatWords> product{nullptr, 0, left.data, left.stride, packed, width_, rank_, width_};
        multiply<Kind<false, false>, kRows>(product, count, take);
    }
    void outer(float* sum, Rows<const float> left, Rows<const float> right, int64_t count) {
        const Product<FloatWords> product{sum, width_, left.data, left.stride, right.data, right.stride, count, width_};
        multiply<Kind<true, true>, kRows>(product, rank_);
    }

  private:
    int64_t rank_, width_;
};

}  // namespace
