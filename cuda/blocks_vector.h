// Vectors of floats for the block kernels, in the compiler's own vector types: 16 lanes with AVX-512, 8 with AVX2, else 4
// (SSE2, NEON). A row of any length is padded to whole vectors in the kernels' own memory; load_some and store_some touch
// the valid lanes alone of a tensor.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>

#include "bfloat16.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define BLOCKS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL BLOCKS_PRAGMA(unroll)
#else
#define UNROLL BLOCKS_PRAGMA(GCC unroll 16)
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define SHUFFLE_QUADS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE_QUADS(a, b, ...) __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

INLINE Vec broadcast(float x) { return x - Vec{}; }  // x - 0 keeps -0, which x + 0 would not

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

INLINE Quad load_quad(const float* p) { return *reinterpret_cast<const Quad*>(p); }
INLINE Quad load_quad(const Bfloat16* p) { return Quad{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }

INLINE void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
INLINE void store(Bfloat16* p, Vec x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    const VecBits bits = reinterpret_cast<VecBits>(x);
    const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VecBits quiet_nan = (bits >> 16) | 0x40;
    const VecBits kept = (bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded;
    *reinterpret_cast<VecHalf*>(p) = __builtin_convertvector(kept, VecHalf);
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
        *reinterpret_cast<Quad*>(to + 2 * i * to_row) = SHUFFLE_QUADS(pairs[i], pairs[i + 2], 0, 1, 4, 5);
        *reinterpret_cast<Quad*>(to + (2 * i + 1) * to_row) = SHUFFLE_QUADS(pairs[i], pairs[i + 2], 2, 3, 6, 7);
    }
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory of a kernel's own, on a cache line's boundary; not initialized.
template <class E>
class Scratch {
  public:
    explicit Scratch(int64_t count) : memory_(new char[count * sizeof(E) + 64]) {
        const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.get());
        data_ = reinterpret_cast<E*>((start + 63) / 64 * 64);
    }
    E* data() { return data_; }

  private:
    std::unique_ptr<char[]> memory_;
    E* data_;
};

}  // namespace
