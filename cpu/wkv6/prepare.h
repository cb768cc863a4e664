// A chunk's operands for the passes over the state: decays, R, K, W and A of wkv6.cpp's head comment.
#pragma once
#include "common/exp.h"
#include "common/shuffles.h"
#include "wkv6/rows.h"

namespace {

constexpr int kPairs = kChunk * kChunk;  // A of one chunk: A_ij at j * kChunk + i

// e[i], which is w, becomes exp(w), and d[i] the decay exp(-exp(w)). From 87 on, where the decay is as good as 0,
// exp(w) stays there: the decay's gradient is their product, which has to vanish too.
template <int kCount>
INLINE void decays(Vec* e, Vec* d) {
    UNROLL for (int i = 0; i < kCount; i++) e[i] = at_most(at_least(e[i], -kLargestExponent), kLargestExponent);
    exp_bounded<kCount>(e);
    UNROLL for (int i = 0; i < kCount; i++) {
        e[i] = at_most(e[i], kLargestExponent);
        d[i] = -e[i];
    }
    exp_bounded<kCount>(d);
}

// Pairs of steps of one half, or of two halves: each summed over its lanes -> A, from A's first pair on.
INLINE void store_pairs(float* A, const Vec a[kHalf][kHalf]) {
    Vec quads[kHalf];
    Quad columns[kHalf];
    UNROLL for (int j = 0; j < kHalf; j++) quads[j] = quad_sums(a[0][j], a[1][j], a[2][j], a[3][j]);
    sums_of_quads(quads, columns);
    UNROLL for (int j = 0; j < kHalf; j++) store_quad(A + j * kChunk, columns[j]);
}

// <x_i, y_j> for rows i and j of kHalf each, with kAcross all of them, else those with j <= i -> A, from A's first pair
// on.
template <int N, bool kAcross>
INLINE void pair_sums(float* A, const float* x, const float* y, Range lanes) {
    constexpr int kColumns = kAccumulators < kHalf * kHalf ? kHalf / 2 : kHalf;  // at once, to stay in registers
    Vec a[kHalf][kHalf];
    UNROLL for (int i = 0; i < kHalf; i++) UNROLL for (int j = 0; j < kHalf; j++) a[i][j] = zero();
    UNROLL for (int first = 0; first < kHalf; first += kColumns)
        for (int64_t c = lanes.begin; c < lanes.end; c += kLanes)
            UNROLL for (int j = first; j < first + kColumns; j++) {
                const Vec yj = load(y + j * N + c);
                UNROLL for (int i = kAcross ? 0 : j; i < kHalf; i++) a[i][j] += load(x + i * N + c) * yj;
            }
    store_pairs(A, a);
}

// The results of prepare: the passes' operands (rows of N floats), and with kKeepDecays d and e for the end of
// backward.
struct Prepared {
    float *R, *K, *W, *A, *d, *e;

    template <int N>
    INLINE Prepared second_half() const {
        return {R + kHalf * N, K + kHalf * N, W, A + kHalf * kChunk + kHalf, d + kHalf * N, e + kHalf * N};
    }
};

// A half by itself: r k w (kHalf rows of N elements, `stride` apart) and u -> R, K, d, e, W and its pairs in A.
template <int N, bool kKeepDecays, class Element>
INLINE void prepare_half(const Element* r, const Element* k, const Element* w, int64_t stride, const float* u,
                         const Prepared& to) {
    Vec a[kHalf][kHalf];
    UNROLL for (int i = 0; i < kHalf; i++) UNROLL for (int j = 0; j < kHalf; j++) a[i][j] = zero();
    for (int c = 0; c < N; c += kLanes) {
        Vec e[kHalf], d[kHalf];
        UNROLL for (int i = 0; i < kHalf; i++) e[i] = load(w + i * stride + c);
        decays<kHalf>(e, d);
        if (kKeepDecays)
            UNROLL for (int i = 0; i < kHalf; i++) {
                store(to.d + i * N + c, d[i]);
                store(to.e + i * N + c, e[i]);
            }
        const Vec r0 = load(r + c), r1 = load(r + stride + c);
        const Vec r2 = load(r + 2 * stride + c), r3 = load(r + 3 * stride + c);
        const Vec k0 = load(k + c), k1 = load(k + stride + c);
        const Vec k2 = load(k + 2 * stride + c), k3 = load(k + 3 * stride + c);
        const Vec bonus = load(u + c);
        const Vec d01 = d[0] * d[1], d23 = d[2] * d[3];
        const Vec k0_1 = k0 * d[1], k0_12 = k0_1 * d[2], k1_2 = k1 * d[2];  // k0_1: k_0 as decayed by step 1

        a[0][0] += r0 * (bonus * k0);
        a[1][1] += r1 * (bonus * k1);
        a[2][2] += r2 * (bonus * k2);
        a[3][3] += r3 * (bonus * k3);
        a[1][0] += r1 * k0;
        a[2][1] += r2 * k1;
        a[3][2] += r3 * k2;
        a[2][0] += r2 * k0_1;
        a[3][1] += r3 * k1_2;
        a[3][0] += r3 * k0_12;

        store(to.R + c, r0);
        store(to.R + N + c, r1 * d[0]);
        store(to.R + 2 * N + c, r2 * d01);
        store(to.R + 3 * N + c, r3 * (d01 * d[2]));
        store(to.K + c, k0_12 * d[3]);
        store(to.K + N + c, k1_2 * d[3]);
        store(to.K + 2 * N + c, k2 * d[3]);
        store(to.K + 3 * N + c, k3);
        store(to.W + c, d01 * d23);
    }
    store_pairs(to.A, a);
}

// r k w (kChunk rows of N elements, `stride` apart) and u -> R, K, d, e (kChunk rows of N floats), W (one row), A
// (kPairs).
template <int N, bool kKeepDecays, class Element>
INLINE void prepare(const Element* r, const Element* k, const Element* w, int64_t stride, const float* u,
                    const Prepared& to) {
    alignas(64) float W[N];  // the second half's
    Prepared second = to.second_half<N>();
    second.W = W;
    prepare_half<N, kKeepDecays>(r, k, w, stride, u, to);
    prepare_half<N, kKeepDecays>(r + kHalf * stride, k + kHalf * stride, w + kHalf * stride, stride, u, second);

    pair_sums<N, true>(to.A + kHalf, second.R, to.K, {0, N});
    for (int c = 0; c < N; c += kLanes) {
        const Vec W0 = load(to.W + c), W1 = load(W + c);
        UNROLL for (int i = 0; i < kHalf; i++) {
            store(second.R + i * N + c, W0 * load(second.R + i * N + c));
            store(to.K + i * N + c, W1 * load(to.K + i * N + c));
        }
        store(to.W + c, W0 * W1);
    }
}

}  // namespace
