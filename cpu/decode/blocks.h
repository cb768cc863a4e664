// y = x Wᵀ for a few rows x and a matrix W (out, in) of blocks: 32 weights along a row share a scale and are integers
// of 8 or 4 bits.
//
// Rows of W stand in panels of 16, a lane each, so that sums need no moves between lanes. A panel's block of 32 columns
// is `bits` words of 32 bits for each row. A word's two halves hold the even and the odd columns of the word's span,
// from the lowest bits on, so that a shift or two make of a word two 16-bit integers of adjacent columns. They meet two
// 16-bit integers of x, which share a scale by blocks of 32 too: what that rounds away is far below what rounding the
// weights does. The integers' sums over a block are exact.
#pragma once
#include <algorithm>
#include <cmath>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/scratch.h"
#include "common/threads.h"
#include "common/vectors.h"

namespace {

typedef int16_t VecShort __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

constexpr int64_t kBlock = 32, kPanel = 16;
constexpr int kPairs = kBlock / 2;
#if defined(__AVX512F__)
constexpr int kMostRows = 8;  // rows of x whose sums fit the registers
#else
constexpr int kMostRows = 4;
#endif

// sum + a0 b0 + a1 b1 in each lane, which holds two 16-bit integers.
INLINE VecInt add_pairs(VecInt sum, VecInt a, VecInt b) {
#if defined(__AVX512VNNI__)
    return (VecInt)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
    return sum + (VecInt)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (VecInt)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (VecInt)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Rows of x as integers times a scale for each block.
struct Points {
    int16_t* integers;  // (rows, in)
    float* scales;      // (rows, in / 32)
};

template <class E>
void round_points(const E* x, Points points, int64_t rows, int64_t in) {
    for (int64_t b = 0; b < rows * in / kBlock; b++) {
        const E* block = x + b * kBlock;
        Vec most = zero(), invalid = zero();
    UNROLL for (int i = 0; i < kBlock; i += kLanes) {
            const Vec value = load(block + i), size = value < 0.0f ? -value : value;
            most = size > most ? size : most;
            invalid += value * 0.0f;  // NaN if the value is NaN or Inf
        }
        float largest = 0.0f, damage = 0.0f;
        UNROLL for (int l = 0; l < kLanes; l++) largest = std::max(largest, most[l]), damage += invalid[l];
        const float scale = largest / 32767.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        const bool small = !std::isfinite(inverse);  // the scale is denormal: such a block counts as zeros
        constexpr float kRound = 12582912.0f;        // 1.5 * 2^23: adding it rounds to an integer
        for (int i = 0; i < kBlock; i++) {
            const float scaled = small || damage != 0.0f ? 0.0f : to_float(block[i]) * inverse;
            const float rounded = (scaled + kRound) - kRound;
            points.integers[b * kBlock + i] = static_cast<int16_t>(std::min(std::max(rounded, -32767.0f), 32767.0f));
        }
        points.scales[b] = scale + damage;
    }
}

// The panels of W.
struct Panels {
    const int32_t* words;    // (panels, in / 32, bits, 16)
    const Bfloat16* scales;  // (panels, in / 32, 16)
};

// M rows of x by kLanes rows of a panel: y (M, 16).
template <int kBits, int M>
INLINE void block_lanes(const int16_t* x, const float* x_scales, Panels w, float* y, int64_t in) {
    constexpr int kParts = 16 / kBits;
    const int64_t blocks = in / kBlock;
    Vec sum[M];
    UNROLL for (int m = 0; m < M; m++) sum[m] = zero();
    for (int64_t b = 0; b < blocks; b++) {
        VecInt whole[M];
        UNROLL for (int m = 0; m < M; m++) whole[m] = VecInt{};
        const int32_t* words = w.words + b * kBits * kPanel;
        UNROLL for (int j = 0; j < kBits; j++) {
            const VecShort word = *reinterpret_cast<const VecShort*>(words + j * kPanel);
            UNROLL for (int i = 0; i < kParts; i++) {
                const VecInt pairs = (VecInt)(VecShort)((VecShort)(word << (16 - kBits * (i + 1))) >> (16 - kBits));
                UNROLL for (int m = 0; m < M; m++) {
                    int32_t pair;
                    memcpy(&pair, x + m * in + b * kBlock + 2 * (j * kParts + i), 4);
                    whole[m] = add_pairs(whole[m], pairs, pair - VecInt{});
                }
            }
        }
        const Vec scale = load(w.scales + b * kPanel);
        UNROLL for (int m = 0; m < M; m++)
            sum[m] += __builtin_convertvector(whole[m], Vec) * (scale * x_scales[m * blocks + b]);
    }
    UNROLL for (int m = 0; m < M; m++) store(y + m * kPanel, sum[m]);
}

// M rows of x by a panel, of which y (rows, out) takes the first `count` rows.
template <class E, int kBits, int M>
void block_panel(Points x, Panels w, E* y, int64_t in, int64_t out, int64_t count) {
    float sums[M * kPanel];
    for (int64_t l = 0; l < kPanel; l += kLanes)
        block_lanes<kBits, M>(x.integers, x.scales, {w.words + l, w.scales + l}, sums + l, in);
    for (int m = 0; m < M; m++)
        for (int64_t l = 0; l < count; l++) y[m * out + l] = from_float<E>(sums[m * kPanel + l]);
}

template <class E, int kBits>
void blocks(const E* x, Panels w, E* y, int64_t rows, int64_t in, int64_t out, int threads) {
    static thread_local Workspace memory;
    const int64_t panels = (out + kPanel - 1) / kPanel, count = in / kBlock;
    float* scales = static_cast<float*>(memory.get(rows * (count * sizeof(float) + in * sizeof(int16_t))));
    const Points points = {reinterpret_cast<int16_t*>(scales + rows * count), scales};
    round_points(x, points, rows, in);
    parallel(panels, out * in, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t p = first; p < end; p++) {
            const Panels panel = {w.words + p * count * kBits * kPanel, w.scales + p * count * kPanel};
            const int64_t o = p * kPanel, lanes = std::min(kPanel, out - o);
            const auto rest = [&](int64_t m) { return Points{points.integers + m * in, points.scales + m * count}; };
            int64_t m = 0;
            for (; m + kMostRows <= rows; m += kMostRows)
                block_panel<E, kBits, kMostRows>(rest(m), panel, y + m * out + o, in, out, lanes);
            for (; m + 4 <= rows; m += 4) block_panel<E, kBits, 4>(rest(m), panel, y + m * out + o, in, out, lanes);
            for (; m < rows; m++) block_panel<E, kBits, 1>(rest(m), panel, y + m * out + o, in, out, lanes);
        }
    });
}

}  // namespace
