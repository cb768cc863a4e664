// Moves between lanes: sums over the lanes of several vectors at once, and transposes.
#pragma once
#include "common/vectors.h"

// Lanes picked from a (0 to kLanes - 1) and b (from kLanes on); IN_EACH_QUAD repeats a pattern in every four lanes,
// QUADS names the first lanes of four whole quads.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE_QUADS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VecInt){__VA_ARGS__})
#define SHUFFLE_QUADS(a, b, ...) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){__VA_ARGS__})
#endif
#define QUAD(o, i, j, k, l) (i) + (o), (j) + (o), (k) + (o), (l) + (o)
#define QUADS(a, b, c, d) QUAD(a, 0, 1, 2, 3), QUAD(b, 0, 1, 2, 3), QUAD(c, 0, 1, 2, 3), QUAD(d, 0, 1, 2, 3)
#if defined(__AVX512F__)
#define IN_EACH_QUAD(...) QUAD(0, __VA_ARGS__), QUAD(4, __VA_ARGS__), QUAD(8, __VA_ARGS__), QUAD(12, __VA_ARGS__)
#define IN_QUADS(i, j, k, l) QUAD(i, 0, 1, 2, 3), QUAD(j, 0, 1, 2, 3), QUAD(k, 0, 1, 2, 3), QUAD(l, 0, 1, 2, 3)
#define EVEN_QUADS(a, b) SHUFFLE(a, b, IN_QUADS(0, 8, 16, 24))
#define ODD_QUADS(a, b) SHUFFLE(a, b, IN_QUADS(4, 12, 20, 28))
#elif defined(__AVX2__)
#define IN_EACH_QUAD(...) QUAD(0, __VA_ARGS__), QUAD(4, __VA_ARGS__)
#else
#define IN_EACH_QUAD(...) QUAD(0, __VA_ARGS__)
#endif

namespace {

// Four vectors -> in each quad of lanes, that quad's sums over a, b, c and d.
INLINE Vec quad_sums(Vec a, Vec b, Vec c, Vec d) {
    constexpr int L = kLanes;
    const Vec ab = SHUFFLE(a, b, IN_EACH_QUAD(0, L, 1, L + 1)) + SHUFFLE(a, b, IN_EACH_QUAD(2, L + 2, 3, L + 3));
    const Vec cd = SHUFFLE(c, d, IN_EACH_QUAD(0, L, 1, L + 1)) + SHUFFLE(c, d, IN_EACH_QUAD(2, L + 2, 3, L + 3));
    return SHUFFLE(ab, cd, IN_EACH_QUAD(0, 1, L, L + 1)) + SHUFFLE(ab, cd, IN_EACH_QUAD(2, 3, L + 2, L + 3));
}

// The sum of a vector's quads.
INLINE Quad sum_of_quads(Vec x) {
    const float* p = reinterpret_cast<const float*>(&x);
    Quad sum = load_quad(p);
    UNROLL for (int q = 4; q < kLanes; q += 4) sum += load_quad(p + q);
    return sum;
}

// The sum of a vector's lanes.
INLINE float total(Vec x) {
    const Quad sum = sum_of_quads(x);
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// For four vectors x[i], each in quads: out[i] = the sum of the quads of x[i].
INLINE void sums_of_quads(const Vec* x, Quad* out) {
#if defined(__AVX512F__)
    const Vec x01 = SHUFFLE(x[0], x[1], QUADS(0, 4, 16, 20)) + SHUFFLE(x[0], x[1], QUADS(8, 12, 24, 28));
    const Vec x23 = SHUFFLE(x[2], x[3], QUADS(0, 4, 16, 20)) + SHUFFLE(x[2], x[3], QUADS(8, 12, 24, 28));
    const Vec all = SHUFFLE(x01, x23, QUADS(0, 8, 16, 24)) + SHUFFLE(x01, x23, QUADS(4, 12, 20, 28));
    const __m512 sum = reinterpret_cast<__m512>(all);
    out[0] = reinterpret_cast<Quad>(_mm512_castps512_ps128(sum));
    out[1] = reinterpret_cast<Quad>(_mm512_extractf32x4_ps(sum, 1));
    out[2] = reinterpret_cast<Quad>(_mm512_extractf32x4_ps(sum, 2));
    out[3] = reinterpret_cast<Quad>(_mm512_extractf32x4_ps(sum, 3));
#else
    UNROLL for (int i = 0; i < 4; i++) out[i] = sum_of_quads(x[i]);
#endif
}

// A vector whose quads lie `apart` from one another.
INLINE Vec load_quads(const float* p, int64_t apart) {
#if defined(__AVX512F__)
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(p));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(p + apart), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(p + 2 * apart), 2);
    return reinterpret_cast<Vec>(_mm512_insertf32x4(x, _mm_loadu_ps(p + 3 * apart), 3));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec>(
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + apart), 1));
#else
    (void)apart;
    return load(p);
#endif
}

// kLanes rows of four floats, `from_row` apart, become four rows of kLanes, `to_row` apart, transposed.
INLINE void transpose_lanes(float* to, int64_t to_row, const float* from, int64_t from_row) {
    constexpr int L = kLanes;
    Vec rows[4], pairs[4];
    UNROLL for (int i = 0; i < 4; i++) rows[i] = load_quads(from + i * from_row, 4 * from_row);
    UNROLL for (int i = 0; i < 4; i += 2) {
        pairs[i] = SHUFFLE(rows[i], rows[i + 1], IN_EACH_QUAD(0, L, 1, L + 1));
        pairs[i + 1] = SHUFFLE(rows[i], rows[i + 1], IN_EACH_QUAD(2, L + 2, 3, L + 3));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        store(to + 2 * i * to_row, SHUFFLE(pairs[i], pairs[i + 2], IN_EACH_QUAD(0, 1, L, L + 1)));
        store(to + (2 * i + 1) * to_row, SHUFFLE(pairs[i], pairs[i + 2], IN_EACH_QUAD(2, 3, L + 2, L + 3)));
    }
}

// 16 rows of 16 floats, side by side, become their transpose.
INLINE void transpose_block(float* to, const float* from) {
#if defined(__AVX512F__)
    Vec rows[16];
    UNROLL for (int i = 0; i < 16; i++) rows[i] = load(from + i * 16);
    UNROLL for (int i = 0; i < 16; i += 4) {  // in each quad of lanes
        const Vec a = SHUFFLE(rows[i], rows[i + 2], IN_EACH_QUAD(0, 16, 1, 17));
        const Vec b = SHUFFLE(rows[i], rows[i + 2], IN_EACH_QUAD(2, 18, 3, 19));
        const Vec c = SHUFFLE(rows[i + 1], rows[i + 3], IN_EACH_QUAD(0, 16, 1, 17));
        const Vec d = SHUFFLE(rows[i + 1], rows[i + 3], IN_EACH_QUAD(2, 18, 3, 19));
        rows[i] = SHUFFLE(a, c, IN_EACH_QUAD(0, 16, 1, 17));
        rows[i + 1] = SHUFFLE(a, c, IN_EACH_QUAD(2, 18, 3, 19));
        rows[i + 2] = SHUFFLE(b, d, IN_EACH_QUAD(0, 16, 1, 17));
        rows[i + 3] = SHUFFLE(b, d, IN_EACH_QUAD(2, 18, 3, 19));
    }
    UNROLL for (int i = 0; i < 4; i++) {  // the quads
        const Vec a = EVEN_QUADS(rows[i], rows[4 + i]), b = EVEN_QUADS(rows[8 + i], rows[12 + i]);
        const Vec c = ODD_QUADS(rows[i], rows[4 + i]), d = ODD_QUADS(rows[8 + i], rows[12 + i]);
        store(to + i * 16, EVEN_QUADS(a, b));
        store(to + (4 + i) * 16, EVEN_QUADS(c, d));
        store(to + (8 + i) * 16, ODD_QUADS(a, b));
        store(to + (12 + i) * 16, ODD_QUADS(c, d));
    }
#else
    for (int j = 0; j < 16; j += 4)
        UNROLL for (int i = 0; i < 16; i += kLanes) transpose_lanes(to + j * 16 + i, 16, from + i * 16 + j, 16);
#endif
}

// Four rows of four elements, `from_row` apart, become four rows of floats, `to_row` apart, transposed.
template <class E>
INLINE void transpose_quads(float* to, int64_t to_row, const E* from, int64_t from_row) {
    Quad rows[4], pairs[4];
    UNROLL for (int i = 0; i < 4; i++) rows[i] = load_quad(from + i * from_row);
    UNROLL for (int i = 0; i < 4; i += 2) {
        pairs[i] = SHUFFLE_QUADS(rows[i], rows[i + 1], 0, 4, 1, 5);
        pairs[i + 1] = SHUFFLE_QUADS(rows[i], rows[i + 1], 2, 6, 3, 7);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        store_quad(to + 2 * i * to_row, SHUFFLE_QUADS(pairs[i], pairs[i + 2], 0, 1, 4, 5));
        store_quad(to + (2 * i + 1) * to_row, SHUFFLE_QUADS(pairs[i], pairs[i + 2], 2, 3, 6, 7));
    }
}

}  // namespace
