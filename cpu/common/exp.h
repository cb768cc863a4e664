// The exponential, for |x| up to 87, within about one unit in the last place; exp(0) is exactly 1.
//
// x = n ln 2 + f, n whole and |f| <= ln 2 / 2, where e^f is a minimax polynomial. Adding kRound to n leaves no room for
// a fraction, and the exponent of 2^n in the lowest bits. With AVX-512, vectors take n as a multiple of 1/16 instead,
// look up 16 powers of 2 in a register, and get by with a shorter polynomial, its relative error below 1e-8.
#pragma once
#include <initializer_list>

#include "common/vectors.h"

namespace {

constexpr float kLargestExponent = 87.0f;  // exp of it is finite, exp of minus it a normal number
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
constexpr float kRound = 12583039.0f;  // 1.5 * 2^23 + 127

INLINE float power_of_2(float shifted) {
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits <<= 23;
    float power;
    memcpy(&power, &bits, 4);
    return power;
}
INLINE Vec power_of_2(Vec shifted) { return reinterpret_cast<Vec>(reinterpret_cast<VecInt>(shifted) << 23); }

// x[i] becomes exp(x[i]), for kCount floats or vectors. One's operations wait for each other, so each is done for all.
template <int kCount, class T>
INLINE void exp_by_polynomial(T* x) {
    T rounded[kCount], p[kCount];
    UNROLL for (int i = 0; i < kCount; i++) rounded[i] = x[i] * kLog2E + kRound;
    UNROLL for (int i = 0; i < kCount; i++) {
        const T n = rounded[i] - kRound;
        x[i] = (x[i] - n * kLn2High) - n * kLn2Low;
    }
    UNROLL for (int i = 0; i < kCount; i++) p[i] = x[i] * 1.38145e-3f + 8.36875e-3f;
    for (const float coefficient : {4.166839e-2f, 1.666652e-1f, 0.49999993f, 1.0f, 1.0f})
        UNROLL for (int i = 0; i < kCount; i++) p[i] = p[i] * x[i] + coefficient;
    UNROLL for (int i = 0; i < kCount; i++) x[i] = p[i] * power_of_2(rounded[i]);
}

// The same for vectors, by the fastest way.
#if defined(__AVX512F__)
alignas(64) constexpr float kPowers[kLanes] = {1.0f, 1.04427373f, 1.09050775f, 1.13878858f,
                                               1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
                                               1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                               1.68179286f, 1.75625217f, 1.8340081f, 1.91520655f};

template <int kCount>
INLINE void exp_bounded(Vec* x) {
    const float kRound16 = 786432.0f;  // 1.5 * 2^19: adding it leaves sixteenths, their number in the lowest bits
    Vec rounded[kCount];
    UNROLL for (int i = 0; i < kCount; i++) rounded[i] = x[i] * kLog2E + kRound16;
    UNROLL for (int i = 0; i < kCount; i++) {
        const Vec n = rounded[i] - kRound16, f = (x[i] - n * kLn2High) - n * kLn2Low;
        const Vec beyond_1 = ((f * 0.16666667f + 0.5f) * f + 1.0f) * f;
        const __m512 power = _mm512_permutexvar_ps(reinterpret_cast<__m512i>(rounded[i]), _mm512_load_ps(kPowers));
        const __m512 product = reinterpret_cast<__m512>(beyond_1) * power + power;
        x[i] = reinterpret_cast<Vec>(_mm512_scalef_ps(product, reinterpret_cast<__m512>(n)));
    }
}
#else
template <int kCount>
INLINE void exp_bounded(Vec* x) {
    exp_by_polynomial<kCount>(x);
}
#endif

// exp(x) of any x, which beyond the bounds counts as the nearest; a NaN stays one. For loops that the compiler
// vectorizes.
inline float exp_of(float x) {
    x = x < -kLargestExponent ? -kLargestExponent : x;
    x = x > kLargestExponent ? kLargestExponent : x;
    exp_by_polynomial<1>(&x);
    return x;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }
INLINE Vec sigmoid(Vec x) {
    Vec power = at_most(at_least(-x, -kLargestExponent), kLargestExponent);
    exp_bounded<1>(&power);
    return 1.0f / (1.0f + power);
}

}  // namespace
