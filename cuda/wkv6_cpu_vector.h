// Vectors of floats for the CPU kernel, in the compiler's own vector types: 16 lanes with AVX-512, 8 with AVX2, else 4
// (SSE2, NEON). Everything lives in a namespace named after the instruction set, so that the linker never merges two
// copies of one function that were compiled for different processors.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "bfloat16.h"

#define WKV6_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL WKV6_PRAGMA(unroll)
#else
#define UNROLL WKV6_PRAGMA(GCC unroll 16)
#endif
#define INLINE inline __attribute__((always_inline))

namespace wkv6 {
namespace WKV6_LEVEL {
namespace {

// kAccumulators: vectors of a state that fit in registers beside their operands.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kAccumulators = 8;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kAccumulators = 16;
#else
constexpr int kLanes = 4, kAccumulators = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Vec4 __attribute__((vector_size(16), aligned(4), may_alias));

INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
INLINE Vec4 load4(const float* p) { return *reinterpret_cast<const Vec4*>(p); }
INLINE void store4(float* p, Vec4 x) { *reinterpret_cast<Vec4*>(p) = x; }
INLINE Vec broadcast(float x) { return x - Vec{}; }  // x - 0 keeps -0, which x + 0 would not
INLINE Vec zero() { return Vec{}; }

// Bounds that let a NaN through: the processor's maximum and minimum return their second operand where one is a NaN.
#if defined(__AVX512F__)
INLINE Vec at_least(Vec x, float bound) {
    return reinterpret_cast<Vec>(_mm512_max_ps(_mm512_set1_ps(bound), reinterpret_cast<__m512>(x)));
}
INLINE Vec at_most(Vec x, float bound) {
    return reinterpret_cast<Vec>(_mm512_min_ps(_mm512_set1_ps(bound), reinterpret_cast<__m512>(x)));
}
#elif defined(__AVX2__)
INLINE Vec at_least(Vec x, float bound) {
    return reinterpret_cast<Vec>(_mm256_max_ps(_mm256_set1_ps(bound), reinterpret_cast<__m256>(x)));
}
INLINE Vec at_most(Vec x, float bound) {
    return reinterpret_cast<Vec>(_mm256_min_ps(_mm256_set1_ps(bound), reinterpret_cast<__m256>(x)));
}
#else
INLINE Vec at_least(Vec x, float bound) { return broadcast(bound) > x ? broadcast(bound) : x; }
INLINE Vec at_most(Vec x, float bound) { return broadcast(bound) < x ? broadcast(bound) : x; }
#endif

// Lanes picked from a (0 to kLanes - 1) and b (from kLanes on); IN_EACH_QUAD repeats a pattern in every four lanes.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VecInt){__VA_ARGS__})
#define SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, (int __attribute__((vector_size(16)))){__VA_ARGS__})
#endif
#define QUAD(o, i, j, k, l) (i) + (o), (j) + (o), (k) + (o), (l) + (o)
#if defined(__AVX512F__)
#define IN_EACH_QUAD(...) QUAD(0, __VA_ARGS__), QUAD(4, __VA_ARGS__), QUAD(8, __VA_ARGS__), QUAD(12, __VA_ARGS__)
#elif defined(__AVX2__)
#define IN_EACH_QUAD(...) QUAD(0, __VA_ARGS__), QUAD(4, __VA_ARGS__)
#else
#define IN_EACH_QUAD(...) QUAD(0, __VA_ARGS__)
#endif

// x[i] becomes exp(x[i]), for kCount vectors of -87 <= x <= 87, within about one unit in the last place; exp(0) is exactly 1.
// x = n ln 2 + f, where n is a multiple of 1/16 with AVX-512, which looks up 16 powers of 2 in a register, else whole; e^f is a
// polynomial with relative error below 1e-8. One vector's operations wait for each other, so each is done for all vectors.
#if defined(__AVX512F__)
alignas(64) constexpr float kPowers[kLanes] = {1.0f, 1.04427373f, 1.09050775f, 1.13878858f,
                                               1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
                                               1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                               1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f};

template <int kCount>
INLINE void exp_bounded(Vec* x) {
    const float kRound = 786432.0f;  // 1.5 * 2^19: adding it leaves sixteenths, the number of which is in the lowest bits
    Vec rounded[kCount];
    UNROLL for (int i = 0; i < kCount; i++) rounded[i] = x[i] * 1.44269504088896341f + kRound;
    UNROLL for (int i = 0; i < kCount; i++) {
        const Vec n = rounded[i] - kRound, f = (x[i] - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
        const Vec beyond_1 = ((f * 0.16666667f + 0.5f) * f + 1.0f) * f;
        const __m512 power = _mm512_permutexvar_ps(reinterpret_cast<__m512i>(rounded[i]), _mm512_load_ps(kPowers));
        const __m512 product = reinterpret_cast<__m512>(beyond_1) * power + power;
        x[i] = reinterpret_cast<Vec>(_mm512_scalef_ps(product, reinterpret_cast<__m512>(n)));
    }
}
#else
template <int kCount>
INLINE void exp_bounded(Vec* x) {
    const float kRound = 12583039.0f;  // 1.5 * 2^23 + 127: adding it leaves no fraction, and 2^n's exponent in the lowest bits
    Vec rounded[kCount], p[kCount];
    UNROLL for (int i = 0; i < kCount; i++) rounded[i] = x[i] * 1.44269504088896341f + kRound;
    UNROLL for (int i = 0; i < kCount; i++) {
        const Vec n = rounded[i] - kRound;
        x[i] = (x[i] - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    }
    UNROLL for (int i = 0; i < kCount; i++) p[i] = x[i] * 1.38145e-3f + 8.36875e-3f;
    for (const float coefficient : {4.166839e-2f, 1.666652e-1f, 0.49999993f, 1.0f, 1.0f})
        UNROLL for (int i = 0; i < kCount; i++) p[i] = p[i] * x[i] + coefficient;
    UNROLL for (int i = 0; i < kCount; i++) x[i] = p[i] * reinterpret_cast<Vec>(reinterpret_cast<VecInt>(rounded[i]) << 23);
}
#endif

// Four vectors -> in each quad of lanes, that quad's sums over a, b, c and d.
INLINE Vec quad_sums(Vec a, Vec b, Vec c, Vec d) {
    constexpr int L = kLanes;
    const Vec ab = SHUFFLE(a, b, IN_EACH_QUAD(0, L, 1, L + 1)) + SHUFFLE(a, b, IN_EACH_QUAD(2, L + 2, 3, L + 3));
    const Vec cd = SHUFFLE(c, d, IN_EACH_QUAD(0, L, 1, L + 1)) + SHUFFLE(c, d, IN_EACH_QUAD(2, L + 2, 3, L + 3));
    return SHUFFLE(ab, cd, IN_EACH_QUAD(0, 1, L, L + 1)) + SHUFFLE(ab, cd, IN_EACH_QUAD(2, 3, L + 2, L + 3));
}

// The sum of a vector's quads.
INLINE Vec4 sum_of_quads(Vec x) {
    const float* p = reinterpret_cast<const float*>(&x);
    Vec4 sum = load4(p);
    UNROLL for (int q = 4; q < kLanes; q += 4) sum += load4(p + q);
    return sum;
}

// Four vectors -> their four sums.
INLINE Vec4 sums(Vec a, Vec b, Vec c, Vec d) { return sum_of_quads(quad_sums(a, b, c, d)); }

// For four vectors x[i], each in quads: out[i] = the sum of the quads of x[i].
INLINE void sums_of_quads(const Vec* x, Vec4* out) {
#if defined(__AVX512F__)
    const Vec x01 = SHUFFLE(x[0], x[1], QUAD(0, 0, 1, 2, 3), QUAD(4, 0, 1, 2, 3), QUAD(16, 0, 1, 2, 3), QUAD(20, 0, 1, 2, 3)) +
                    SHUFFLE(x[0], x[1], QUAD(8, 0, 1, 2, 3), QUAD(12, 0, 1, 2, 3), QUAD(24, 0, 1, 2, 3), QUAD(28, 0, 1, 2, 3));
    const Vec x23 = SHUFFLE(x[2], x[3], QUAD(0, 0, 1, 2, 3), QUAD(4, 0, 1, 2, 3), QUAD(16, 0, 1, 2, 3), QUAD(20, 0, 1, 2, 3)) +
                    SHUFFLE(x[2], x[3], QUAD(8, 0, 1, 2, 3), QUAD(12, 0, 1, 2, 3), QUAD(24, 0, 1, 2, 3), QUAD(28, 0, 1, 2, 3));
    const Vec all = SHUFFLE(x01, x23, QUAD(0, 0, 1, 2, 3), QUAD(8, 0, 1, 2, 3), QUAD(16, 0, 1, 2, 3), QUAD(24, 0, 1, 2, 3)) +
                    SHUFFLE(x01, x23, QUAD(4, 0, 1, 2, 3), QUAD(12, 0, 1, 2, 3), QUAD(20, 0, 1, 2, 3), QUAD(28, 0, 1, 2, 3));
    const __m512 sum = reinterpret_cast<__m512>(all);
    out[0] = reinterpret_cast<Vec4>(_mm512_castps512_ps128(sum));
    out[1] = reinterpret_cast<Vec4>(_mm512_extractf32x4_ps(sum, 1));
    out[2] = reinterpret_cast<Vec4>(_mm512_extractf32x4_ps(sum, 2));
    out[3] = reinterpret_cast<Vec4>(_mm512_extractf32x4_ps(sum, 3));
#else
    UNROLL for (int i = 0; i < 4; i++) out[i] = sum_of_quads(x[i]);
#endif
}

// to, of n columns and n rows at distance `to_stride`, becomes the transpose of `from`; n is a multiple of 4.
INLINE void transpose(float* to, int to_stride, const float* from, int from_stride, int n) {
    for (int i = 0; i < n; i += 4)
        for (int j = 0; j < n; j += 4) {
            const float* p = from + i * from_stride + j;
            const Vec4 a = load4(p), b = load4(p + from_stride), c = load4(p + 2 * from_stride), d = load4(p + 3 * from_stride);
            const Vec4 ab_low = SHUFFLE4(a, b, 0, 4, 1, 5), ab_high = SHUFFLE4(a, b, 2, 6, 3, 7);
            const Vec4 cd_low = SHUFFLE4(c, d, 0, 4, 1, 5), cd_high = SHUFFLE4(c, d, 2, 6, 3, 7);
            float* q = to + j * to_stride + i;
            store4(q, SHUFFLE4(ab_low, cd_low, 0, 1, 4, 5));
            store4(q + to_stride, SHUFFLE4(ab_low, cd_low, 2, 3, 6, 7));
            store4(q + 2 * to_stride, SHUFFLE4(ab_high, cd_high, 0, 1, 4, 5));
            store4(q + 3 * to_stride, SHUFFLE4(ab_high, cd_high, 2, 3, 6, 7));
        }
}

// kLanes bfloat16 values <-> floats.
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

INLINE Vec load(const Bfloat16* p) {
    const VecBits bits = __builtin_convertvector(*reinterpret_cast<const VecHalf*>(p), VecBits);
    return reinterpret_cast<Vec>(bits << 16);
}
INLINE void store(Bfloat16* p, Vec x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    const VecBits bits = reinterpret_cast<VecBits>(x);
    const VecBits rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet_nan = bits | 0x400000;
    const VecBits kept = x != x ? quiet_nan : rounded;
    *reinterpret_cast<VecHalf*>(p) = __builtin_convertvector(kept >> 16, VecHalf);
#endif
}

}  // namespace
}  // namespace WKV6_LEVEL
}  // namespace wkv6
