// y = x Wᵀ for a few rows x and a matrix W (out, in) of blocks: 32 weights along a row share a scale and are integers
// of 8 or 4 bits, kept without a sign: 128 or 8 more than they are.
//
// Rows of W stand in panels of 16, a lane each, so that sums need no moves between lanes. A panel's block of 32 columns
// is `bits` words of 32 bits for each row. Four columns are a word's bytes; of 4 bits, they are the lower halves of its
// bytes, and the next four columns the upper ones, so that a mask, or a shift and a mask, leaves four columns in bytes.
// They meet four integers of x, of 8 bits, which share a scale by blocks of 32 too: what that rounds away is about what
// rounding x to bfloat16 does. Sums over a block are exact; what the weights have too much is taken from each at once.
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
typedef int8_t VecByte __attribute__((vector_size(kLanes), aligned(1), may_alias));

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
    INLINE VecInt total() const { return kBits == 8 ? folded(lower) + (folded(upper) << 4) : folded(lower); }

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
    static INLINE VecInt folded(VecShort sums) { return (((VecInt)sums << 16) >> 16) + ((VecInt)sums >> 16); }
};
#endif

INLINE int32_t largest_lane(VecInt x) {
    int32_t lanes[kLanes], most = 0;
    memcpy(lanes, &x, sizeof(x));
    UNROLL for (int l = 0; l < kLanes; l++) most = std::max(most, lanes[l]);
    return most;
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
        const float inverse = largest > 1e-36f ? kMost / largest : 0.0f;  // numbers close to 0 count as zeros
        UNROLL for (int i = 0; i < kBlock; i += kLanes) {
            const Vec value = load(x + i) * inverse + kRound;
            const VecByte bytes = __builtin_convertvector((VecInt)value, VecByte);
            memcpy(reinterpret_cast<int8_t*>(words) + i, &bytes, sizeof(bytes));
            all += value - kRound;
        }
        excess = -static_cast<int32_t>(total(all)) * (1 << (bits - 1));  // this sum of integers is exact, too
        scale = largest / kMost;
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
        Sums<kBits> whole[P][M];
        UNROLL for (int j = 0; j < kBits; j++) {
            VecInt word[P];
            UNROLL for (int p = 0; p < P; p++)
                word[p] = *reinterpret_cast<const VecInt*>(w.words + ((p * blocks + b) * kBits + j) * kPanel);
            UNROLL for (int half = 0; half < 8 / kBits; half++) {
                const int i = j * (8 / kBits) + half;
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int p = 0; p < P; p++)
                        whole[p][m].add(kBits == 8 ? word[p] : (word[p] >> (4 * half)) & 0x0f0f0f0f, x[m].words[i]);
            }
        }
        UNROLL for (int p = 0; p < P; p++) {
            const Vec scale = load(w.scales + (p * blocks + b) * kPanel);
            UNROLL for (int m = 0; m < M; m++)
                sum[p][m] += __builtin_convertvector(whole[p][m].total() + x[m].excess, Vec) * (scale * x[m].scale);
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
