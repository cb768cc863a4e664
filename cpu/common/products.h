// Small products of matrices on vectors, their sums in registers: a few rows by up to 4 vectors, which leaves the
// processor bound by its multiply-adds.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// The type that is multiplied: floats here, pairs of bfloat16 in bone/pairs.h.
struct FloatWords {
    using Word = float;
    using Vector = Vec;
    static INLINE Vector load(const Word* p) { return ::load(p); }
    static INLINE Vector broadcast(Word x) { return ::broadcast(x); }
    static INLINE Vec add_product(Vec sum, Vector a, Vector b) { return sum + a * b; }
};

// out[m][c] (+)= sum_k left(m, k) right[k][c] for k below K and c below `width`: rows m of left are its own rows, or
// if it is turned its columns. Strides lead from one row to the next.
template <class Words>
struct Product {
    float* out;
    int64_t out_stride;
    const typename Words::Word* left;
    int64_t left_stride;
    const typename Words::Word* right;
    int64_t right_stride, K, width;
};

// A product's options: kAdd adds to out, kTurned takes left transposed.
template <bool add, bool turned>
struct Kind {
    static constexpr bool kAdd = add, kTurned = turned;
};

// Takes a product's sums into its `out`.
template <class Words>
struct ToOut {
    const Product<Words>& p;
    INLINE void operator()(int64_t m, int64_t c, Vec sum) const { store(p.out + m * p.out_stride + c, sum); }
};

// M rows from m0 on and V vectors from column c on; take(m, c, sum) gets each of these vectors.
template <class Kind, int M, int V, class Words, class Take>
INLINE void multiply_block(const Product<Words>& p, int64_t m0, int64_t c, const Take& take) {
    const int64_t right_stride = p.right_stride, K = p.K;
    const int64_t row = Kind::kTurned ? 1 : p.left_stride, column = Kind::kTurned ? p.left_stride : 1;
    const typename Words::Word *left = p.left + m0 * row, *right = p.right + c;
    Vec sum[M][V];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < V; v++)
            sum[m][v] = Kind::kAdd ? load(p.out + (m0 + m) * p.out_stride + c + v * kLanes) : Vec{};
    for (int64_t k = 0; k < K; k++) {
        typename Words::Vector b[V];
        UNROLL for (int v = 0; v < V; v++) b[v] = Words::load(right + k * right_stride + v * kLanes);
        UNROLL for (int m = 0; m < M; m++) {
            const typename Words::Vector a = Words::broadcast(left[m * row + k * column]);
            UNROLL for (int v = 0; v < V; v++) sum[m][v] = Words::add_product(sum[m][v], a, b[v]);
        }
    }
    asm("" : "+r"(m0));  // addresses of rows are computed anew, rather than kept where the loop needs registers
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < V; v++) take(m0 + m, c + v * kLanes, sum[m][v]);
}

// The columns past the last whole vector.
template <class Kind, int M>
INLINE void multiply_rest(const Product<FloatWords>& p, int64_t m0, int64_t c) {
    const int64_t row = Kind::kTurned ? 1 : p.left_stride, column = Kind::kTurned ? p.left_stride : 1;
    for (; c < p.width; c++) {
        float sum[M];
        for (int m = 0; m < M; m++) sum[m] = Kind::kAdd ? p.out[(m0 + m) * p.out_stride + c] : 0.0f;
        for (int64_t k = 0; k < p.K; k++)
            for (int m = 0; m < M; m++) sum[m] += p.left[(m0 + m) * row + k * column] * p.right[k * p.right_stride + c];
        for (int m = 0; m < M; m++) p.out[(m0 + m) * p.out_stride + c] = sum[m];
    }
}

// M rows from m on; `width` is a whole number of vectors, but for floats whose sums go to `out`.
template <class Kind, int M, class Words, class Take>
void multiply_rows(const Product<Words>& p, int64_t m, const Take& take) {
    const int64_t width = p.width;
    int64_t c = 0;
    for (; c + kVectors * kLanes <= width; c += kVectors * kLanes) multiply_block<Kind, M, kVectors>(p, m, c, take);
    for (; c + 2 * kLanes <= width; c += 2 * kLanes) multiply_block<Kind, M, 2>(p, m, c, take);
    for (; c + kLanes <= width; c += kLanes) multiply_block<Kind, M, 1>(p, m, c, take);
    if constexpr (std::is_same<Take, ToOut<FloatWords>>::value) multiply_rest<Kind, M>(p, m, c);
}

// All `rows` rows, kRows at a time. Sums go to `out`, or to take(m, c, sum) as they leave the registers.
template <class Kind, int kRows, class Words, class Take>
INLINE void multiply(const Product<Words>& p, int64_t rows, const Take& take) {
    int64_t m = 0;
    for (; m + kRows <= rows; m += kRows) multiply_rows<Kind, kRows>(p, m, take);
    for (; m + 4 <= rows; m += 4) multiply_rows<Kind, 4>(p, m, take);
    for (; m < rows; m++) multiply_rows<Kind, 1>(p, m, take);
}
template <class Kind, int kRows, class Words>
INLINE void multiply(const Product<Words>& p, int64_t rows) {
    multiply<Kind, kRows>(p, rows, ToOut<Words>{p});
}

// out[a][k] = rows[a] . matrix[k], for kRows rows a and kCount rows k of the matrix, all `size` long.
template <int kRows, int kCount, class Out>
void dot_products(Out* out, int64_t out_stride, const float* rows, int64_t stride, const float* matrix, int64_t size) {
    Vec sum[kRows][kCount];
    for (int a = 0; a < kRows; a++)
        for (int k = 0; k < kCount; k++) sum[a][k] = Vec{};
    int64_t c = 0;
    for (; c + kLanes <= size; c += kLanes)
        for (int k = 0; k < kCount; k++) {
            const Vec factor = load(matrix + k * size + c);
            for (int a = 0; a < kRows; a++) sum[a][k] += load(rows + a * stride + c) * factor;
        }
    for (int a = 0; a < kRows; a++)
        for (int k = 0; k < kCount; k++) {
            float total = 0.0f;
            for (int l = 0; l < kLanes; l++) total += sum[a][k][l];
            for (int64_t rest = c; rest < size; rest++) total += rows[a * stride + rest] * matrix[k * size + rest];
            out[a * out_stride + k] = from_float<Out>(total);
        }
}

}  // namespace
