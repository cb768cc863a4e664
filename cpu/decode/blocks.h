// y = x Wᵀ for a few rows x and a matrix W (out, in) of blocks: 32 weights along a row share a scale and are integers
// of 8 or 4 bits, kept without a sign: 128 or 8 more than they are.
//
// Rows of W stand in panels of 16, a lane each, so that sums need no moves between lanes. A panel's block of 32 columns
// is `bits` words of 32 bits for each row. Four columns are a word's bytes; of 4 bits, they are the lower halves of its
// bytes, and the next four columns the upper ones, so that a mask, or a shift and a mask, leaves four columns in bytes.
// They meet four integers of x, of 16 bits, which share a scale by blocks of 32 too: what that rounds away is far below
// what rounding the weights does. Sums over a block are exact; what the weights have too much is taken from each at
// once.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/prefetch.h"
#include "common/scratch.h"
#include "common/shuffles.h"
#include "common/threads.h"

namespace {

constexpr int64_t kBlock = 32, kPanel = 16;
constexpr int kWords = kBlock / 4;
constexpr int kTogether = 4;  // rows of x that are computed together
#if defined(__AVX512F__)
constexpr int kPanels = 2;  // panels that meet them at once: as many sums as fit the registers
#else
constexpr int kPanels = 1;
#endif

#if !defined(__AVX512VNNI__)
// sum + a0 b0 + a1 b1 in each lane, which holds two 16-bit integers.
INLINE VecInt add_pairs(VecInt sum, VecInt a, VecInt b) {
#if defined(__AVX512F__)
    return sum + (VecInt)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (VecInt)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (VecInt)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
#endif

// Sums of products of four weights, bytes in each lane, with four integers of x, which two words hold: the integers'
// upper and lower bytes if the processor multiplies bytes, else those of even and of odd bytes.
struct Sums {
    VecInt first, second;
#if defined(__AVX512VNNI__)
    INLINE void add(VecInt weights, int32_t upper, int32_t lower) {
        first = (VecInt)_mm512_dpbusd_epi32((__m512i)first, (__m512i)weights, _mm512_set1_epi32(upper));
        second = (VecInt)_mm512_dpbusd_epi32((__m512i)second, (__m512i)weights, _mm512_set1_epi32(lower));
    }
    INLINE VecInt total() const { return (first << 8) + second; }
    static void split(const int32_t* x, int32_t* words) {
        int8_t bytes[2][kBlock];
        for (int i = 0; i < kBlock; i++) bytes[0][i] = (x[i] + 128) >> 8, bytes[1][i] = x[i];
        memcpy(words, bytes, sizeof(bytes));
    }
#else
    INLINE void add(VecInt weights, int32_t even, int32_t odd) {
        first = add_pairs(first, weights & 0xff00ff, even - VecInt{});
        second = add_pairs(second, (weights >> 8) & 0xff00ff, odd - VecInt{});
    }
    INLINE VecInt total() const { return first + second; }
    static void split(const int32_t* x, int32_t* words) {
        for (int i = 0; i < kWords; i++, x += 4)
            for (int odd = 0; odd < 2; odd++) words[odd * kWords + i] = (x[odd] & 0xffff) | x[odd + 2] << 16;
    }
#endif
};

INLINE float largest_lane(Vec x) {
    float lanes[kLanes];
    store(lanes, x);
    Quad most = load_quad(lanes);
    UNROLL for (int q = 4; q < kLanes; q += 4) {
        const Quad next = load_quad(lanes + q);
        most = next > most ? next : most;
    }
    return std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
}

// A block of a row of x: integers times a scale.
struct Point {
    int32_t words[2 * kWords];
    int32_t excess;  // what the weights have too much times the integers, negative
    float scale;

    template <class E>
    void round(const E* x, int bits) {
        constexpr float kMost = 32639.0f;      // 127 * 256 + 127
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
        Vec most = zero(), invalid = zero(), all = zero();
        UNROLL for (int i = 0; i < kBlock; i += kLanes) {
            const Vec value = load(x + i), size = value < 0.0f ? -value : value;
            most = size > most ? size : most;
            invalid += value * 0.0f;  // NaN if the value is NaN or Inf
        }
        const float largest = largest_lane(most), damage = total(invalid);
        const float inverse = kMost / largest;
        const bool empty = !std::isfinite(inverse) || damage != 0.0f;  // numbers close to 0 count as zeros
        int32_t integers[kBlock];
        UNROLL for (int i = 0; i < kBlock; i += kLanes) {
            const Vec scaled = empty ? zero() : (load(x + i) * inverse + kRound) - kRound;
            const Vec value = at_most(at_least(scaled, -kMost), kMost);
            *reinterpret_cast<VecInt*>(integers + i) = __builtin_convertvector(value, VecInt);
            all += value;
        }
        Sums::split(integers, words);
        excess = -static_cast<int32_t>(total(all)) * (1 << (bits - 1));  // this sum of integers is exact, too
        scale = largest / kMost + damage;
    }
};

// The panels of W.
struct Panels {
    const int32_t* words;    // (panels, in / 32, bits, 16)
    const Bfloat16* scales;  // (panels, in / 32, 16)
};

// M rows of x, (blocks, M) points, by kLanes rows of P panels of in / 32 = `blocks` blocks: y (M, P, 16).
template <int kBits, int P, int M, class E>
INLINE void block_lanes(const Point* x, Panels w, E* y, int64_t blocks, Stream& ahead) {
    Vec sum[P][M];
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int m = 0; m < M; m++) sum[p][m] = zero();
    for (int64_t b = 0; b < blocks; b++, x += M) {
        if (M > 1) ahead.step();
        Sums whole[P][M];
        UNROLL for (int p = 0; p < P; p++)
            UNROLL for (int m = 0; m < M; m++) whole[p][m] = {VecInt{}, x[m].excess - VecInt{}};
        UNROLL for (int j = 0; j < kBits; j++) {
            VecInt word[P];
            UNROLL for (int p = 0; p < P; p++)
                word[p] = *reinterpret_cast<const VecInt*>(w.words + ((p * blocks + b) * kBits + j) * kPanel);
            UNROLL for (int half = 0; half < 8 / kBits; half++) {
                const int i = j * (8 / kBits) + half;
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int p = 0; p < P; p++)
                        whole[p][m].add(kBits == 8 ? word[p] : (word[p] >> (4 * half)) & 0x0f0f0f0f, x[m].words[i],
                                        x[m].words[kWords + i]);
            }
        }
        UNROLL for (int p = 0; p < P; p++) {
            const Vec scale = load(w.scales + (p * blocks + b) * kPanel);
            UNROLL for (int m = 0; m < M; m++)
                sum[p][m] += __builtin_convertvector(whole[p][m].total(), Vec) * (scale * x[m].scale);
        }
    }
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int m = 0; m < M; m++) store(y + (m * P + p) * kPanel, sum[p][m]);
}

// Multiplies M rows of x by P panels; y (rows, out) takes the first `count` of the panels' rows.
template <class E, int kBits, int P, int M>
void block_panels(const Point* x, Panels w, E* y, int64_t blocks, int64_t out, int64_t count, Stream& ahead) {
    E sums[M * P * kPanel];
    for (int64_t l = 0; l < kPanel; l += kLanes)
        block_lanes<kBits, P, M>(x, {w.words + l, w.scales + l}, sums + l, blocks, ahead);
    for (int m = 0; m < M; m++) memcpy(y + m * out, sums + m * P * kPanel, count * sizeof(E));
}

// All rows of x, whose points lie kTogether rows side by side, by P panels.
template <class E, int kBits, int P>
void block_rows(const Point* x, Panels w, E* y, int64_t rows, int64_t blocks, int64_t out, int64_t count) {
    const int64_t size = P * blocks * kBits * kPanel;
    Stream ahead(w.words + size, size * sizeof(int32_t), std::max<int64_t>(rows / kTogether, 1) * blocks);
    int64_t m = 0;
    for (; m + kTogether <= rows; m += kTogether)
        block_panels<E, kBits, P, kTogether>(x + m * blocks, w, y + m * out, blocks, out, count, ahead);
    for (; m < rows; m++) block_panels<E, kBits, P, 1>(x + m * blocks, w, y + m * out, blocks, out, count, ahead);
}

template <class E, int kBits>
void blocks(const E* x, Panels w, E* y, int64_t rows, int64_t in, int64_t out, int threads) {
    static thread_local Workspace memory;
    const int64_t panels = (out + kPanel - 1) / kPanel, count = in / kBlock;
    Point* points = static_cast<Point*>(memory.get(rows * count * sizeof(Point)));
    parallel(rows, rows * in, threads, [=](int64_t m, int64_t end, int) {
        for (; m < end; m++) {
            const int64_t first = m / kTogether * kTogether, M = first + kTogether <= rows ? kTogether : 1;
            Point* own = points + (M == 1 ? m * count : first * count + m - first);
            for (int64_t b = 0; b < count; b++) own[b * M].round(x + m * in + b * kBlock, kBits);
        }
    });
    parallel(panels, out * in, threads, [=](int64_t p, int64_t end, int) {
        const auto run = [&](auto P) {
            const Panels own = {w.words + p * count * kBits * kPanel, w.scales + p * count * kPanel};
            const int64_t first = p * kPanel;
            block_rows<E, kBits, P>(points, own, y + first, rows, count, out, std::min(P * kPanel, out - first));
            p += P;
        };
        while (rows >= kTogether && p + kPanels <= end) run(std::integral_constant<int, kPanels>());
        while (p < end) run(std::integral_constant<int, 1>());
    });
}

}  // namespace
