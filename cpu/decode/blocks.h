// y = x Wᵀ for a few rows x and a matrix W (out, in) of blocks: 32 weights along a row share a scale and are integers
// of 8 or 4 bits, kept without a sign: 128 or 8 more than they are.
//
// Rows of W stand in panels of 16, a lane each, so that sums need no moves between lanes. A panel's block of 32 columns
// is `bits` words of 32 bits for each row, and their scales, because a processor foresees one stream of memory better
// than two. Four columns are a word's bytes; of 4 bits, they are the lower halves of its bytes, and the next four
// columns the upper ones, so that a mask, or a shift and a mask, leaves four columns in bytes. They meet four integers
// of x, of 8 bits, which share a scale by blocks of 32 too: what that rounds away is about what rounding x to bfloat16
// does. Sums over a block are exact; what the weights have too much is taken from each at once.
#pragma once
#include <algorithm>
#include <type_traits>

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

typedef int16_t VecShort __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// Sums of products of the four bytes in each lane, weights without a sign, with the four integers of a word of x.
#if defined(__AVX512VNNI__)
template <int kBits>
struct Sums {
    VecInt sum{};
    INLINE void add(VecInt weights, int32_t x) {
        sum = (VecInt)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x));
    }
    INLINE VecInt total() const { return sum; }
};
#else
// Two products with weights below 16 and their sums over a block fit 16 bits; larger weights are two of them.
template <int kBits>
struct Sums {
    VecShort lower{}, upper{};
    INLINE void add(VecInt weights, int32_t x) {
        lower += pairs(kBits == 8 ? weights & 0x0f0f0f0f : weights, x - VecInt{});
        if (kBits == 8) upper += pairs((weights >> 4) & 0x0f0f0f0f, x - VecInt{});
    }
    INLINE VecInt total() const { return kBits == 8 ? folded(lower, 1) + folded(upper, 16) : folded(lower, 1); }

    static INLINE VecShort pairs(VecInt weights, VecInt x) {
#if defined(__AVX512F__)
        return (VecShort)_mm512_maddubs_epi16((__m512i)weights, (__m512i)x);
#elif defined(__AVX2__)
        return (VecShort)_mm256_maddubs_epi16((__m256i)weights, (__m256i)x);
#else
        const VecShort w = (VecShort)weights, p = (VecShort)x;
        return (w & 0xff) * ((p << 8) >> 8) + (w >> 8) * (p >> 8);
#endif
    }
    static INLINE VecInt folded(VecShort sums, int16_t factor) {
#if defined(__AVX512F__)
        return (VecInt)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(factor));
#elif defined(__AVX2__)
        return (VecInt)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(factor));
#else
        return ((((VecInt)sums << 16) >> 16) + ((VecInt)sums >> 16)) * factor;
#endif
    }
};
#endif

INLINE int32_t largest_lane(VecInt x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t most = x[0];
    UNROLL for (int l = 1; l < kLanes; l++) most = std::max(most, x[l]);
    return most;
#endif
}

// A block of a row of x: integers times a scale.
struct Point {
    int32_t words[kWords];
    int32_t excess;  // what the weights have too much times the integers, negative
    float scale;     // NaN or Inf if a number is

    template <class E>
    void round(const E* x, int bits) {
        constexpr float kMost = 127.0f;
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
        VecInt most{};
        Vec all = zero();
        UNROLL for (int i = 0; i < kBlock; i += kLanes) {
            const VecInt size = (VecInt)load(x + i) & 0x7fffffff;  // ordered like the numbers, and NaN the largest
            most = size > most ? size : most;
        }
        const int32_t largest_bits = largest_lane(most);
        float largest;
        memcpy(&largest, &largest_bits, sizeof(largest));
        const float inverse = kMost / std::max(largest, 1e-36f);  // numbers close to 0 count as zeros
        int32_t integers[kBlock];
        UNROLL for (int i = 0; i < kBlock; i += kLanes) {
            const Vec value = load(x + i) * inverse + kRound;
            memcpy(integers + i, &value, sizeof(value));
            all += value - kRound;
        }
        for (int i = 0; i < kBlock; i++) reinterpret_cast<int8_t*>(words)[i] = integers[i];
        excess = -static_cast<int32_t>(total(all)) * (1 << (bits - 1));  // this sum of integers is exact, too
        scale = largest * (1.0f / kMost);
    }
};

template <int kBits>
constexpr int64_t kSize = kBits * kPanel + kPanel / 2;  // words of a panel's block

// M rows of x, (blocks, M) points, by kLanes rows, from `lane` on, of P panels w of in / 32 = `blocks` blocks: y (M, P,
// 16).
template <int kBits, int P, int M, class E>
INLINE void block_lanes(const Point* x, const int32_t* w, E* y, int64_t blocks, int64_t lane, Stream& ahead) {
    Vec sum[P][M];
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int m = 0; m < M; m++) sum[p][m] = zero();
    for (int64_t b = 0; b < blocks; b++, x += M, w += kSize<kBits>) {
        ahead.step();
        Sums<kBits> whole[P][M];
        const int32_t* block[P];
        UNROLL for (int p = 0; p < P; p++) block[p] = w + p * blocks * kSize<kBits>;
        UNROLL for (int j = 0; j < kBits; j++) {
            VecInt word[P];
            UNROLL for (int p = 0; p < P; p++)
                word[p] = *reinterpret_cast<const VecInt*>(block[p] + j * kPanel + lane);
            UNROLL for (int half = 0; half < 8 / kBits; half++) {
                const int i = j * (8 / kBits) + half;
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int p = 0; p < P; p++)
                        whole[p][m].add(kBits == 8 ? word[p] : (word[p] >> (4 * half)) & 0x0f0f0f0f, x[m].words[i]);
            }
        }
        UNROLL for (int p = 0; p < P; p++) {
            const Vec scale = load(reinterpret_cast<const Bfloat16*>(block[p] + kBits * kPanel) + lane);
            UNROLL for (int m = 0; m < M; m++)
                sum[p][m] += __builtin_convertvector(whole[p][m].total() + x[m].excess, Vec) * (scale * x[m].scale);
        }
    }
    UNROLL for (int p = 0; p < P; p++)
        UNROLL for (int m = 0; m < M; m++) store(y + (m * P + p) * kPanel + lane, sum[p][m]);
}

// Multiplies M rows of x by P panels; y (rows, out) takes the first `count` of the panels' rows.
template <class E, int kBits, int P, int M>
void block_panels(const Point* x, const int32_t* w, E* y, int64_t blocks, int64_t out, int64_t count, Stream& ahead) {
    E sums[M * P * kPanel];
    for (int64_t lane = 0; lane < kPanel; lane += kLanes)
        block_lanes<kBits, P, M>(x, w, sums, blocks, lane, ahead);
    for (int m = 0; m < M; m++) memcpy(y + m * out, sums + m * P * kPanel, count * sizeof(E));
}

// All rows of x, whose points lie kTogether rows side by side, by P panels. The next ones are fetched if computing
// takes longer than reading; else the processor itself, which foresees them, is faster.
template <class E, int kBits, int P>
void block_rows(const Point* x, const int32_t* w, E* y, int64_t rows, int64_t blocks, int64_t out, int64_t count) {
    const int64_t size = P * blocks * kSize<kBits>;
    Stream ahead(w + size, rows > kTogether ? size * sizeof(int32_t) : 0, (rows + kTogether - 1) / kTogether * blocks);
    const auto run = [&](auto M, int64_t m) {
        block_panels<E, kBits, P, M>(x + m * blocks, w, y + m * out, blocks, out, count, ahead);
    };
    int64_t m = 0;
    for (; m + kTogether <= rows; m += kTogether) run(std::integral_constant<int, kTogether>(), m);
    if (m + 3 == rows) run(std::integral_constant<int, 3>(), m);
    if (m + 2 == rows) run(std::integral_constant<int, 2>(), m);
    if (m + 1 == rows) run(std::integral_constant<int, 1>(), m);
}

// w: (panels, in / 32) blocks.
template <class E, int kBits>
void blocks(const E* x, const int32_t* w, E* y, int64_t rows, int64_t in, int64_t out, int threads) {
    static thread_local Workspace memory;
    const int64_t panels = (out + kPanel - 1) / kPanel, count = in / kBlock;
    Point* points = static_cast<Point*>(memory.get(rows * count * sizeof(Point)));
    parallel(rows, rows * in, threads, [=](int64_t m, int64_t end, int) {
        for (; m < end; m++) {
            const int64_t first = m / kTogether * kTogether, M = std::min<int64_t>(kTogether, rows - first);
            Point* own = points + first * count + m - first;
            for (int64_t b = 0; b < count; b++) own[b * M].round(x + m * in + b * kBlock, kBits);
        }
    });
    parallel(panels, out * in, threads, [=](int64_t p, int64_t end, int) {
        const auto run = [&](auto P) {
            const int64_t first = p * kPanel, here = std::min(P * kPanel, out - first);
            block_rows<E, kBits, P>(points, w + p * count * kSize<kBits>, y + first, rows, count, out, here);
            p += P;
        };
        while (rows > kTogether && p + kPanels <= end) run(std::integral_constant<int, kPanels>());
        while (p < end) run(std::integral_constant<int, 1>());
    });
}

}  // namespace
