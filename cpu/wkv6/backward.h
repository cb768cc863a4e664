// Backward of one head of one sequence: the gradients inside chunks, and the order of passes and chunks.
#pragma once
#include <initializer_list>

#include "common/prefetch.h"
#include "wkv6/passes.h"
#include "wkv6/prepare.h"

namespace {

// The gradients that a task of backward writes: r's, k's and w's as Gradient, v's as Element.
template <class Element, class Gradient>
struct Gradients {
    Gradient *r, *k, *w;
    int64_t stride;  // elements from one step of r, k, w to the next
    Element* v;
    float *u, *state;
};

// Chunk m of a tile from rows of N elements: all in floats, and what the passes need. gy may be null.
template <int N, class Element>
INLINE void start_chunk(BackwardWork<N>& q, int m, const Element* r, const Element* k, const Element* v,
                        const Element* w, const Element* gy, int64_t stride) {
    const int chunk = m * kChunk * N;
    prepare<N, true>(r, k, w, stride, q.u,
                     {q.R + chunk, q.K + chunk, q.W + m * N, q.A + m * kPairs, q.d + chunk, q.e + chunk});
    copy_rows<N>(q.r + chunk, r, stride);
    copy_rows<N>(q.k + chunk, k, stride);
    copy_rows<N>(q.v + chunk, v, stride);
    copy_rows<N>(q.gy + chunk, gy, stride);
}

// The same from q.padded, for chunks that are not whole.
template <int N>
APART void start_padded_chunk(BackwardWork<N>& q, int m, const float* gy) {
    start_chunk<N>(q, m, q.padded[0], q.padded[1], q.padded[2], q.padded[3], gy, N);
}

// Places for a chunk's gradients: kChunk rows of N numbers each.
template <class Element, class Gradient>
struct ChunkGradients {
    Gradient *r, *k, *w;
    int64_t stride;
    Element* v;
    int64_t v_stride;
};

// The inputs and outputs of finish_half: pointers to the first row's lanes of a half.
template <class Gradient>
struct HalfRows {
    const float *r, *k, *d, *e;
    const float* G;  // the half's own pairs
    Gradient *gr, *gk, *gw;
    int64_t stride;
};

// Gradients of a half, kLanes channels. P, Q: the terms of its reads and writes with the state outside of it; through:
// dL / d log d by writes before and reads after it; gu advances.
template <int N, class Gradient>
INLINE void finish_half(const HalfRows<Gradient>& at, const Vec P[kHalf], const Vec Q[kHalf], Vec through, Vec bonus,
                        Vec& gu) {
    const float *r = at.r, *k = at.k, *d = at.d, *G = at.G;
    const Vec d0 = load(d), d1 = load(d + N), d2 = load(d + 2 * N), d3 = load(d + 3 * N);
    const Vec d01 = d0 * d1, d23 = d2 * d3;
    const Vec k0 = load(k), k1 = load(k + N), k2 = load(k + 2 * N);
    const Vec r1 = load(r + N), r2 = load(r + 2 * N), r3 = load(r + 3 * N);
    const Vec g10 = broadcast(G[1]), g20 = broadcast(G[2]), g30 = broadcast(G[3]);
    const Vec g21 = broadcast(G[kChunk + 2]), g31 = broadcast(G[kChunk + 3]), g32 = broadcast(G[2 * kChunk + 3]);

    // Through the state: the parts of r's and k's gradients.
    Vec gr[kHalf] = {P[0], P[1] * d0, P[2] * d01, P[3] * (d01 * d2)};
    Vec gk[kHalf] = {Q[0] * (d1 * d23), Q[1] * d23, Q[2] * d3, Q[3]};

    // dL / d log d, by where the read is (after the half or in it) and where the write (before it or in it).
    const Vec read3 = r3 * gr[3], read23 = r2 * gr[2] + read3, read123 = r1 * gr[1] + read23;
    const Vec write0 = k0 * gk[0], write01 = k1 * gk[1] + write0, write012 = k2 * gk[2] + write01;
    Vec gd[kHalf] = {through + read123, through + write0 + read23, through + write01 + read3, through + write012};

    // Between the steps of the half.
    const Vec z20 = g20 * d1, z31 = g31 * d2, z30 = g30 * (d1 * d2);
    const Vec r2_z20 = r2 * z20, r3_z31 = r3 * z31, r3_z30 = r3 * z30;
    gr[1] += g10 * k0;
    gr[2] += g21 * k1 + z20 * k0;
    gr[3] += g32 * k2 + z31 * k1 + z30 * k0;
    gk[0] += g10 * r1 + r2_z20 + r3_z30;
    gk[1] += g21 * r2 + r3_z31;
    gk[2] += g32 * r3;
    const Vec across_both = r3_z30 * k0;  // written at 0, read at 3: decayed by steps 1 and 2
    gd[1] += r2_z20 * k0 + across_both;
    gd[2] += r3_z31 * k1 + across_both;

    // The bonus u, and out.
    UNROLL for (int i = 0; i < kHalf; i++) {
        const Vec own = broadcast(G[i * kChunk + i]), ri = load(r + i * N), ki = load(k + i * N);
        const Vec own_bonus = own * bonus;
        gu += (own * ri) * ki;
        store(at.gr + i * at.stride, gr[i] + own_bonus * ki);
        store(at.gk + i * at.stride, gk[i] + own_bonus * ri);
        store(at.gw + i * at.stride, -gd[i] * load(at.e + i * N));
    }
}

// The gradients of chunk m, from P and Q of the passes and from the pairs inside the chunk; gu advances.
template <int N, class Element, class Gradient>
void finish_chunk(BackwardWork<N>& q, Range values, int m, const ChunkGradients<Element, Gradient>& to) {
    constexpr int kSecond = kHalf * N;  // from a row of the first half to the same of the second
    const int chunk = m * kChunk * N;
    const float *gy = q.gy + chunk, *v = q.v + chunk, *A = q.A + m * kPairs, *gv = q.gv + chunk;
    alignas(64) float G[kPairs];  // A's gradient: G_ij = <gy_i, v_j>
    float *G_across = G + kHalf, *G_second = G + kHalf * kChunk + kHalf;
    pair_sums<N, false>(G, gy, v, values);
    pair_sums<N, true>(G_across, gy + kSecond, v, values);
    pair_sums<N, false>(G_second, gy + kSecond, v + kSecond, values);

    for (int64_t c = values.begin; c < values.end; c += kLanes) {
        Vec gradient[kChunk];
        UNROLL for (int i = 0; i < kChunk; i++) gradient[i] = load(gy + i * N + c);
        UNROLL for (int j = 0; j < kChunk; j++) {
            Vec sum = load(gv + j * N + c);
            UNROLL for (int i = j; i < kChunk; i++) sum += broadcast(A[j * kChunk + i]) * gradient[i];
            store(to.v + j * to.v_stride + c, sum);
        }
    }

    for (int c = 0; c < N; c += kLanes) {
        const float *r = q.r + chunk + c, *k = q.k + chunk + c, *d = q.d + chunk + c, *e = q.e + chunk + c;
        const float *P = q.P + chunk + c, *Q = q.Q + chunk + c;
        // K of the first half's steps at its end, R of the second half's at its beginning, and both halves' decays.
        const Vec d3 = load(d + 3 * N), d23 = load(d + 2 * N) * d3, d123 = load(d + N) * d23, W0 = load(d) * d123;
        const float *d_second = d + kSecond, *r_second = r + kSecond;
        const Vec d4 = load(d_second), d45 = d4 * load(d_second + N), d456 = d45 * load(d_second + 2 * N);
        const Vec W1 = d456 * load(d_second + 3 * N);
        const Vec K[kHalf] = {load(k) * d123, load(k + N) * d23, load(k + 2 * N) * d3, load(k + 3 * N)};
        const Vec R[kHalf] = {load(r_second), load(r_second + N) * d4, load(r_second + 2 * N) * d45,
                              load(r_second + 3 * N) * d456};

        // Each half's terms with the outside: the state beyond the chunk, and the other half.
        Vec P0[kHalf], Q0[kHalf], P1[kHalf], Q1[kHalf];
        const Vec SD = load(q.SD + m * N + c);
        Vec read = W1 * SD, written = W0 * SD;  // <S, D> at the first half's end and at the second half's beginning
        UNROLL for (int i = 0; i < kHalf; i++) {
            P0[i] = load(P + i * N);
            Q1[i] = load(Q + kSecond + i * N);
            const Vec before = load(P + kSecond + i * N), after = load(Q + i * N);
            read += R[i] * before;
            written += K[i] * after;
            P1[i] = W0 * before;
            Q0[i] = W1 * after;
        }
        UNROLL for (int j = 0; j < kHalf; j++) UNROLL for (int i = 0; i < kHalf; i++) {
            const Vec pair = broadcast(G_across[j * kChunk + i]);
            P1[i] += pair * K[j];
            Q0[j] += pair * R[i];
        }
        const Vec bonus = load(q.u + c);
        Vec gu = load(q.gu + c);
        finish_half<N, Gradient>({r, k, d, e, G, to.r + c, to.k + c, to.w + c, to.stride}, P0, Q0, W0 * read, bonus,
                                 gu);
        const int64_t second = kHalf * to.stride + c;
        finish_half<N, Gradient>({r_second, k + kSecond, d_second, e + kSecond, G_second, to.r + second, to.k + second,
                                  to.w + second, to.stride}, P1, Q1, W1 * written, bonus, gu);
        store(q.gu + c, gu);
    }
}

template <int N, class Element, class Gradient>
void backward_head(BackwardWork<N>& q, const Task& task, const Element* r, const Element* k, const Element* v,
                   const Element* w, const float* u, const float* state, const float* checkpoints, const Element* gy,
                   const float* gfinal, const Gradients<Element, Gradient>& to) {
    const int n = task.n;
    const int64_t stride = task.stride;
    const Range values = task.values, key_columns{0, n};
    const Range value_columns{values.begin, values.end < n ? values.end : n};
    for (int c = 0; c < N; c++) q.u[c] = c < n ? u[c] : 0.0f;
    memset(q.gu, 0, sizeof q.gu);
    load_transposed_state<N>(q.D, gfinal, n);
    for (int64_t start = (task.length - 1) / kTile * kTile; start >= 0; start -= kTile) {
        const int steps = task.length - start < kTile ? task.length - start : kTile;
        const int chunks = (steps + kChunk - 1) / kChunk;
        load_transposed_state<N>(q.S, start ? checkpoints + (start / kTile - 1) * task.checkpoint : state, n);
        Ahead outputs;
        for (Gradient* rows : {to.r, to.k, to.w}) outputs.add(rows + start * to.stride, to.stride, steps, n);
        outputs.add(to.v + start * stride, stride, steps, n);
        for (int m = 0; m < chunks; m++) {
            const int left = steps - m * kChunk;
            const int64_t offset = (start + m * kChunk) * stride;
            const Element* chunk_gy = gy ? gy + offset : gy;
            if (left >= kChunk && n == N) {
                start_chunk<N>(q, m, r + offset, k + offset, v + offset, w + offset, chunk_gy, stride);
                continue;
            }
            float* padded_gy = q.Q;  // not in use yet
            pad_rows<N>(q.padded[0], r + offset, stride, left, n);
            pad_rows<N>(q.padded[1], k + offset, stride, left, n);
            pad_rows<N>(q.padded[2], v + offset, stride, left, n);
            pad_rows<N>(q.padded[3], w + offset, stride, left, n, kNoDecay);
            if (gy) pad_rows<N>(padded_gy, chunk_gy, stride, left, n);
            start_padded_chunk(q, m, gy ? padded_gy : nullptr);
        }
        state_pass<N>(q, values, chunks, outputs);
        const int64_t previous = (start - kTile) * stride;
        Ahead inputs;
        if (start) {
            for (const Element* rows : {r, k, v, w}) inputs.add(rows + previous, stride, kTile, n);
            if (gy) inputs.add(gy + previous, stride, kTile, n);
            inputs.add(start > kTile ? checkpoints + (start / kTile - 2) * task.checkpoint : state, n, n, n);
        }
        for (int begin = (chunks - 1) / kSpanChunks * kSpanChunks; begin >= 0; begin -= kSpanChunks) {
            const Range span{begin, chunks < begin + kSpanChunks ? chunks : begin + kSpanChunks};
            gradient_pass<N>(q, values, span, inputs);
            for (int64_t m = span.end - 1; m >= span.begin; m--) {
                const int left = steps - m * kChunk, present = left < kChunk ? left : kChunk;
                const int64_t first = start + m * kChunk;
                const int64_t key = first * to.stride;
                const ChunkGradients<Element, Gradient> rows{
                    to.r + key, to.k + key, to.w + key, to.stride, to.v + first * stride, stride};
                if (left >= kChunk && n == N) {
                    finish_chunk<N>(q, values, m, rows);
                    continue;
                }
                const int chunk = m * kChunk * N;  // P, Q, e and gv of this chunk have served when they are written
                const ChunkGradients<float, float> own{
                    q.P + chunk, q.Q + chunk, q.e + chunk, N, q.gv + chunk, N};
                finish_chunk<N>(q, values, m, own);
                store_rows<N>(rows.r, q.P + chunk, to.stride, present, key_columns);
                store_rows<N>(rows.k, q.Q + chunk, to.stride, present, key_columns);
                store_rows<N>(rows.w, q.e + chunk, to.stride, present, key_columns);
                store_rows<N>(rows.v, q.gv + chunk, stride, present, value_columns);
            }
        }
    }
    for (int c = 0; c < n; c++) to.u[c] = q.gu[c];
    for (int i = 0; i < n; i++)
        for (int64_t c = value_columns.begin; c < value_columns.end; c++) to.state[i * n + c] = q.D[c * N + i];
}

}  // namespace
