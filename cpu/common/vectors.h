// Vectors of floats in the compiler's own vector types: 16 lanes with AVX-512, 8 with AVX2, else 4 (SSE2, NEON). In
// memory they are floats or bfloat16; load_some and store_some touch the valid lanes alone.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/bfloat16.h"

#define VECTORS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL VECTORS_PRAGMA(unroll)
#else
#define UNROLL VECTORS_PRAGMA(GCC unroll 16)
#endif
#define INLINE inline __attribute__((always_inline))
#define APART __attribute__((noinline))  // of seldom run code, which else would be compiled at each call

namespace {  // each library has its own copies, compiled for its instruction set

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

INLINE Vec broadcast(float x) { return x - Vec{}; }  // x - 0 keeps -0, which x + 0 would not
INLINE Vec zero() { return Vec{}; }

INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
INLINE Vec load(const Bfloat16* p) {  // the compiler's own conversion goes by way of halves
#if defined(__AVX512F__)
    const VecBits bits = (VecBits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    const VecBits bits = (VecBits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    const VecBits bits = __builtin_convertvector(*reinterpret_cast<const VecHalf*>(p), VecBits);
#endif
    return reinterpret_cast<Vec>(bits << 16);
}

INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
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

// The first n lanes; the others are zeros, or left alone.
template <class E>
INLINE Vec load_some(const E* p, int64_t n) {
    if (n >= kLanes) return load(p);
    E lanes[kLanes] = {};
    memcpy(lanes, p, n * sizeof(E));
    return load(lanes);
}
template <class E>
INLINE void store_some(E* p, Vec x, int64_t n) {
    if (n >= kLanes) return store(p, x);
    E lanes[kLanes];
    store(lanes, x);
    memcpy(p, lanes, n * sizeof(E));
}

INLINE Quad load_quad(const float* p) { return *reinterpret_cast<const Quad*>(p); }
INLINE Quad load_quad(const Bfloat16* p) {
    return Quad{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
INLINE void store_quad(float* p, Quad x) { *reinterpret_cast<Quad*>(p) = x; }

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

INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#else
    for (int i = 0; i < kLanes; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// 1 / x within about one unit in the last place, for normal x whose reciprocal is one.
INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    const Vec near = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
    return near + near * (1.0f - x * near);
#else
    return 1.0f / x;
#endif
}

}  // namespace
