// Forward of one head of one sequence.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "common/prefetch.h"
#include "wkv6/block.h"
#include "wkv6/prepare.h"

namespace {

template <int N>
struct ForwardWork {
    StepRows<N, kSpan> v, R, K, y;
    alignas(64) float W[kSpan / kChunk * N], A[kSpan / kChunk * kPairs], u[N], S[N * N];
    alignas(64) float padded[4][kChunk * N];
};

// S through `chunks` chunks: y_i += S^T R_i, then S = W S + sum_j K_j v_j^T. Rows of S are keys, lanes values.
template <int N, int kVectors>
void forward_pass(float* S, Range values, const float* R, const float* K, const float* W, const float* v, float* y,
                  int chunks, Ahead& ahead) {
    constexpr int kRows = block_rows(kVectors);
    for (int64_t l = values.begin; l < values.end; l += kVectors * kLanes)
        for (int row = 0; row < N; row += kRows) {
            ahead.fetch(1);
            Block<N, kRows, kVectors> block;
            block.load_from(S + row * N + l);
            for (int m = 0; m < chunks; m++) {
                const int chunk = m * kChunk * N;
                block.read(R + chunk + row, y + chunk + l, false);
                block.decay_rows(W + m * N + row);
                block.write(K + chunk + row, v + chunk + l);
            }
            block.store_to(S + row * N + l);
        }
}

template <int N>
void forward_states(ForwardWork<N>& q, Range values, int chunks, Ahead& ahead) {
    constexpr int kWide = block_vectors(N), kNarrow = block_vectors(kSmallestValueBlock);
    if (values.end - values.begin >= kWide * kLanes)
        forward_pass<N, kWide>(q.S, values, q.R, q.K, q.W, q.v, q.y, chunks, ahead);
    else
        forward_pass<N, kNarrow>(q.S, values, q.R, q.K, q.W, q.v, q.y, chunks, ahead);
}

// One step: reads the state once and writes it once, which may be its place.
template <int N, class Element>
void single_step(ForwardWork<N>& q, const Task& task, const Element* r, const Element* k, const Element* v,
                 const Element* w, const float* u, const float* state, Element* y, float* final_state) {
    const int n = task.n;
    float* decay = q.padded[3];
    pad_rows<N>(q.padded[0], r, 0, 1, n);
    pad_rows<N>(q.padded[1], k, 0, 1, n);
    pad_rows<N>(q.padded[2], v, 0, 1, n);
    pad_rows<N>(decay, w, 0, 1, n);
    for (int c = 0; c < N; c += kLanes) {
        Vec e = load(decay + c), d;
        decays<1>(&e, &d);
        store(decay + c, d);
    }
    const int64_t begin = task.values.begin, end = task.values.end < n ? task.values.end : n;
    const auto columns = [&](auto V, int64_t c) {  // V vectors of values, all rows
        Vec v[V], sum[V];
    UNROLL for (int l = 0; l < V; l++) v[l] = load(q.padded[2] + c + l * kLanes), sum[l] = zero();
        for (int i = 0; i < n; i++) {
            const float ri = q.padded[0][i], ki = q.padded[1][i], di = decay[i], bonus = u[i] * ki;
            UNROLL for (int l = 0; l < V; l++) {
                const int64_t at = i * n + c + l * kLanes, left = end - c - l * kLanes;
                const Vec from = state ? load_some(state + at, left) : zero();
                sum[l] += ri * (from + bonus * v[l]);
                store_some(final_state + at, di * from + ki * v[l], left);
            }
        }
        UNROLL for (int l = 0; l < V; l++) store(q.y + c + l * kLanes, sum[l]);
    };
    int64_t c = begin;
    for (; c + 4 * kLanes <= end; c += 4 * kLanes) columns(std::integral_constant<int, 4>(), c);
    for (; c < end; c += kLanes) columns(std::integral_constant<int, 1>(), c);
    store_rows<N>(y, q.y, 0, 1, {begin, end});
}

// Chunk m of a span from rows of N elements: v in floats, the pass's operands, and y's terms within the chunk.
template <int N, class Element>
void start_chunk(ForwardWork<N>& q, Range values, int m, const Element* r, const Element* k, const Element* v,
                 const Element* w, int64_t stride) {
    const int chunk = m * kChunk * N;
    float* A = q.A + m * kPairs;
    prepare<N, false>(r, k, w, stride, q.u, {q.R + chunk, q.K + chunk, q.W + m * N, A, nullptr, nullptr});
    for (int64_t c = values.begin; c < values.end; c += kLanes) {
        Vec value[kChunk];
    UNROLL for (int j = 0; j < kChunk; j++) {
            value[j] = load(v + j * stride + c);
            store(q.v + chunk + j * N + c, value[j]);
        }
        UNROLL for (int i = 0; i < kChunk; i++) {
            Vec sum = broadcast(A[i]) * value[0];
            UNROLL for (int j = 1; j <= i; j++) sum += broadcast(A[j * kChunk + i]) * value[j];
            store(q.y + chunk + i * N + c, sum);
        }
    }
}

// checkpoints: the first tile starts from `state`, the second's start goes to checkpoints[0], and so on; may be null.
template <int N, class Element>
void forward_head(ForwardWork<N>& q, const Task& task, const Element* r, const Element* k, const Element* v,
                  const Element* w, const float* u, const float* state, Element* y, float* final_state,
                  float* checkpoints) {
    if (task.length == 1) return single_step<N>(q, task, r, k, v, w, u, state, y, final_state);
    const int n = task.n;
    const int64_t stride = task.stride;
    const Range columns{task.values.begin, task.values.end < n ? task.values.end : n};
    for (int c = 0; c < N; c++) q.u[c] = c < n ? u[c] : 0.0f;
    load_state<N>(q.S, state, n);
    for (int64_t start = 0; start < task.length; start += kSpan) {
        const int steps = task.length - start < kSpan ? task.length - start : kSpan;
        const int chunks = (steps + kChunk - 1) / kChunk;
        if (checkpoints && start && start % kTile == 0)
            store_state<N>(checkpoints + (start / kTile - 1) * task.checkpoint, q.S, n, task.values);
        for (int m = 0; m < chunks; m++) {
            const int left = steps - m * kChunk;
            const int64_t offset = (start + m * kChunk) * stride;
            if (left >= kChunk && n == N) {
                start_chunk<N>(q, task.values, m, r + offset, k + offset, v + offset, w + offset, stride);
                continue;
            }
            pad_rows<N>(q.padded[0], r + offset, stride, left, n);
            pad_rows<N>(q.padded[1], k + offset, stride, left, n);
            pad_rows<N>(q.padded[2], v + offset, stride, left, n);
            pad_rows<N>(q.padded[3], w + offset, stride, left, n, kNoDecay);
            start_chunk<N, float>(q, task.values, m, q.padded[0], q.padded[1], q.padded[2], q.padded[3], N);
        }
        const int64_t next = (start + kSpan) * stride, after = task.length - start - kSpan;
        Ahead ahead;
        for (const Element* rows : {r, k, v, w}) ahead.add(rows + next, stride, after, n);
        ahead.add(y + start * stride, stride, steps, n);
        forward_states<N>(q, task.values, chunks, ahead);
        store_rows<N>(y + start * stride, q.y, stride, steps, columns);
    }
    store_state<N>(final_state, q.S, n, task.values);
}

}  // namespace
