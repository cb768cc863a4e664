// Small products of matrices on vectors, their sums in registers: a few rows by up to 4 vectors, which leaves the processor
// bound by its multiply-adds.
#pragma once
#include "common/vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// A left operand: element (m, k) lies at p[m * row + k * column].
template <class Word>
struct Factors {
    const Word* p;
    int64_t row, column;

    Factors below(int64_t m) const { return {p + m * row, row, column}; }
};

// What is multiplied: floats here, pairs of bfloat16 in bone/pairs.h.
struct FloatWords {
    using Word = float;
    using Vector = Vec;
    static INLINE Vector load(const Word* p) { return ::load(p); }
    static INLINE Vector broadcast(Word x) { return ::broadcast(x); }
    static INLINE Vec add_product(Vec sum, Vector a, Vector b) { return sum + a * b; }
};

// A right operand: row k begins at p[k * stride].
template <class Word>
struct Matrix {
    const Word* p;
    int64_t stride;
};

// out[m][v] (+)= sum_k left(m, k) right[k][v], for M rows and V vectors.
template <int M, int V, bool kAdd, class Words, class Word = typename Words::Word>
void multiply_block(float* out, int64_t out_stride, Factors<Word> left, Matrix<Word> right, int64_t K) {
    Vec sum[M][V];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < V; v++) sum[m][v] = kAdd ? load(out + m * out_stride + v * kLanes) : Vec{};
    for (int64_t k = 0; k < K; k++) {
        typename Words::Vector b[V];
        UNROLL for (int v = 0; v < V; v++) b[v] = Words::load(right.p + k * right.stride + v * kLanes);
        UNROLL for (int m = 0; m < M; m++) {
            const typename Words::Vector a = Words::broadcast(left.p[m * left.row + k * left.column]);
            UNROLL for (int v = 0; v < V; v++) sum[m][v] = Words::add_product(sum[m][v], a, b[v]);
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < V; v++) store(out + m * out_stride + v * kLanes, sum[m][v]);
}

// The same for M rows and as many of `width` columns as make whole vectors; -> these columns' number.
template <int M, bool kAdd, class Words, class Word = typename Words::Word>
INLINE int64_t multiply_rows(float* out, int64_t out_stride, Factors<Word> left, Matrix<Word> right, int64_t K, int64_t width) {
    int64_t c = 0;
    for (; c + kVectors * kLanes <= width; c += kVectors * kLanes)
        multiply_block<M, kVectors, kAdd, Words>(out + c, out_stride, left, {right.p + c, right.stride}, K);
    for (; c + 2 * kLanes <= width; c += 2 * kLanes)
        multiply_block<M, 2, kAdd, Words>(out + c, out_stride, left, {right.p + c, right.stride}, K);
    for (; c + kLanes <= width; c += kLanes)
        multiply_block<M, 1, kAdd, Words>(out + c, out_stride, left, {right.p + c, right.stride}, K);
    return c;
}

// The same for any number of rows, kRows at a time; finish(begin, end) follows each few rows.
template <int kRows, bool kAdd, class Words, class Finish, class Word = typename Words::Word>
INLINE void multiply(float* out, int64_t out_stride, Factors<Word> left, Matrix<Word> right, int64_t K, int64_t width,
                     int64_t rows, const Finish& finish) {
    int64_t m = 0;
    for (; m + kRows <= rows; m += kRows) {
        multiply_rows<kRows, kAdd, Words>(out + m * out_stride, out_stride, left.below(m), right, K, width);
        finish(m, m + kRows);
    }
    for (; m + 4 <= rows; m += 4) {
        multiply_rows<4, kAdd, Words>(out + m * out_stride, out_stride, left.below(m), right, K, width);
        finish(m, m + 4);
    }
    for (; m < rows; m++) {
        multiply_rows<1, kAdd, Words>(out + m * out_stride, out_stride, left.below(m), right, K, width);
        finish(m, m + 1);
    }
}

// out += left right for floats, and any number of columns.
inline void add_product(float* out, int64_t out_stride, Factors<float> left, Matrix<float> right, int64_t K, int64_t width,
                        int64_t rows) {
    multiply<4, true, FloatWords>(out, out_stride, left, right, K, width, rows, [](int64_t, int64_t) {});
    for (int64_t c = width / kLanes * kLanes; c < width; c++)
        for (int64_t m = 0; m < rows; m++)
            for (int64_t k = 0; k < K; k++)
                out[m * out_stride + c] += left.p[m * left.row + k * left.column] * right.p[k * right.stride + c];
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
