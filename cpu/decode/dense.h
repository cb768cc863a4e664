// y = x Wᵀ for a few rows x and a plain matrix W (out, in): dot products of rows of W, which come from memory once,
// with rows of x, which stay in the caches.
//
// A processor foresees one stream of memory better than several: one row x meets a row of W after the other. More rows
// meet kWeightRows of them at once, since loading x into registers would take longer than multiplying; the rows of W
// that follow are fetched meanwhile, in one stream. A row's sums are added up in one order in either case, those of
// kWeightRows rows together.
#pragma once
#include <algorithm>

#include "common/prefetch.h"
#include "common/shuffles.h"
#include "common/threads.h"

namespace {

// Products of elements E, whose sums are floats in lanes: kStep elements at a time.
template <class E>
struct Dot {
    using Vector = Vec;
    static constexpr int kStep = kLanes;
    static INLINE Vector from(const E* p) { return load(p); }
    static INLINE Vector some(const E* p, int64_t n) { return load_some(p, n); }
    static INLINE Vec add(Vec sum, Vector a, Vector b) {  // by name, since compilers fuse it in some loops alone
#if defined(__AVX512F__)
        return reinterpret_cast<Vec>(
            _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
#elif defined(__AVX2__)
        return reinterpret_cast<Vec>(
            _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
#else
        return sum + a * b;
#endif
    }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<Bfloat16> {
    using Vector = __m512i;
    static constexpr int kStep = 2 * kLanes;
    static INLINE Vector from(const Bfloat16* p) { return _mm512_loadu_si512(p); }
    static INLINE Vector some(const Bfloat16* p, int64_t n) {
        return _mm512_maskz_loadu_epi16((uint32_t(1) << n) - 1, p);
    }
    static INLINE Vec add(Vec sum, Vector a, Vector b) {
        return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)a, (__m512bh)b));
    }
};
#endif

#if defined(__AVX512F__)
constexpr int kWeightRows = 6;
#else
constexpr int kWeightRows = 2;
#endif
constexpr int kPoints = 4;  // rows of x whose sums with kWeightRows rows fit the registers

// y[m][r] = the sum over the lanes of sum[r][m], added up in one order whatever R and M are.
template <class E, int R, int M>
INLINE void store_totals(const Vec (*sum)[M], E* y, int64_t out) {
    UNROLL for (int first = 0; first < R; first += 4) {
        Vec quads[4];
        Quad totals[4];
        E rounded[16];
        UNROLL for (int i = 0; i < 4; i++) {
            const Vec* own = sum[std::min(first + i, R - 1)];
            quads[i] = quad_sums(own[0], own[std::min(1, M - 1)], own[std::min(2, M - 1)], own[M - 1]);
        }
        sums_of_quads(quads, totals);
        const float* floats = reinterpret_cast<const float*>(totals);
        UNROLL for (int l = 0; l < 16; l += kLanes) store(rounded + l, load(floats + l));
        for (int i = 0; i < std::min(4, R - first); i++)
            UNROLL for (int m = 0; m < M; m++) y[m * out + first + i] = rounded[4 * i + m];
    }
}

// R rows of W by M rows of x: y[m][o] for o below R.
template <class E, int R, int M>
INLINE void dense_tile(const E* x, const E* w, E* y, int64_t in, int64_t out, Stream& ahead) {
    using D = Dot<E>;
    Vec sum[R][M];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int m = 0; m < M; m++) sum[r][m] = zero();
    const auto rows = [&](int from, int to) {
        const auto step = [&](int64_t k, const auto& read) {
            typename D::Vector points[M];
            UNROLL for (int m = 0; m < M; m++) points[m] = read(x + m * in + k);
            UNROLL for (int r = from; r < to; r++) {
                const typename D::Vector row = read(w + r * in + k);
                UNROLL for (int m = 0; m < M; m++) sum[r][m] = D::add(sum[r][m], row, points[m]);
            }
        };
        int64_t k = 0;
        for (; k + D::kStep <= in; k += D::kStep) {
            step(k, [](const E* p) { return D::from(p); });
            ahead.step();
        }
        if (k < in) step(k, [n = in - k](const E* p) { return D::some(p, n); });
    };
    if (M > 1) rows(0, R);
    UNROLL for (int r = 0; M == 1 && r < R; r++) rows(r, r + 1);
    store_totals<E, R, M>(sum, y, out);
}

// R rows of W by all rows of x.
template <class E, int R>
void dense_rows(const E* x, const E* w, E* y, int64_t rows, int64_t in, int64_t out) {
    const int64_t tiles = (rows + kPoints - 1) / kPoints;
    Stream ahead(w + R * in, rows > 1 ? R * in * sizeof(E) : 0, std::max<int64_t>(tiles * (in / Dot<E>::kStep), 1));
    int64_t m = 0;
    for (; m + kPoints <= rows; m += kPoints)
        dense_tile<E, R, kPoints>(x + m * in, w, y + m * out, in, out, ahead);
    if (m + 3 == rows) dense_tile<E, R, 3>(x + m * in, w, y + m * out, in, out, ahead);
    if (m + 2 == rows) dense_tile<E, R, 2>(x + m * in, w, y + m * out, in, out, ahead);
    if (m + 1 == rows) dense_tile<E, R, 1>(x + m * in, w, y + m * out, in, out, ahead);
}

template <class E>
void dense(const E* x, const E* w, E* y, int64_t rows, int64_t in, int64_t out, int threads) {
    parallel((out + kWeightRows - 1) / kWeightRows, out * in, threads, [=](int64_t first, int64_t end, int) {
        int64_t o = first * kWeightRows;
        const int64_t stop = std::min(end * kWeightRows, out);
        for (; o + kWeightRows <= stop; o += kWeightRows)
            dense_rows<E, kWeightRows>(x, w + o * in, y + o, rows, in, out);
        for (; o + 2 <= stop; o += 2) dense_rows<E, 2>(x, w + o * in, y + o, rows, in, out);
        for (; o < stop; o++) dense_rows<E, 1>(x, w + o * in, y + o, rows, in, out);
    });
}

}  // namespace
