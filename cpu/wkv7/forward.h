// Forward of one head of one sequence.
#pragma once
#include <algorithm>

#include "wkv7/states.h"
#include "wkv7/triangles.h"

namespace {

// A sequence's head, or some of its values: its steps, its head size with and without padding, and the distance between
// its saved states.
struct Task {
    int64_t length, n, N, checkpoint;
    Values values;
};

struct ForwardWork {
    Chunk chunk;
    Matrix reads, turned;  // kStack x W; N x kStack
    ForwardWork(Parts parts, int64_t N)
        : chunk(parts, N), reads(parts.take(kStack, N)), turned(parts.take(N, kStack)) {}
    static int64_t floats(int64_t N) { return Chunk::floats(N) + 2 * Parts::floats(kStack, N); }
};

constexpr int64_t kAhead = 1024;  // floats: the processor itself foresees memory within pages of 4 KB only

// One step, the state read once and written once, which may be its place.
template <class E>
void single_step(float* row, const Task& task, const Rows<const E>& rows, const float* state, E* y,
                 float* final_state) {
    const int64_t n = task.n, N = task.N;
    float *r = row, *d = r + N, *k = d + N, *a = k + N, *b = a + N, *old = b + N;
    for (int64_t c = 0; c < N; c += kLanes) {
        Vec decay = load_lanes(rows.w, c, n), slope;
        decays<1>(&decay, &slope);
        store(d + c, decay);
        store(r + c, load_lanes(rows.r, c, n));
        store(k + c, load_lanes(rows.k, c, n));
        store(a + c, load_lanes(rows.a, c, n));
        store(b + c, load_lanes(rows.b, c, n));
        store(old + c, zero());
    }
    const int64_t end = task.values.first + task.values.count;
    Stream ahead((state ? state : final_state) + task.values.first * n + kAhead, task.values.count * n * sizeof(float),
                 task.values.count / 4);
    for (int64_t i = task.values.first; i < end; i += 4) {  // four values, whose sums over keys are taken at once
        ahead.step();
        const float* S[4];
        Vec sums[4];
    UNROLL for (int j = 0; j < 4; j++) {
            S[j] = state ? state + (i + j) * n : old;
            sums[j] = zero();
            for (int64_t c = 0; c < n; c += kLanes) sums[j] += load_lanes(S[j], c, n) * load(a + c);
        }
        const Quad removed = sum_of_quads(quad_sums(sums[0], sums[1], sums[2], sums[3]));
        UNROLL for (int j = 0; j < 4; j++) {
            const Vec value = broadcast(to_float(rows.v[i + j])), taken = broadcast(removed[j]);
            sums[j] = zero();
            for (int64_t c = 0; c < n; c += kLanes) {
                const Vec next = load_lanes(S[j], c, n) * load(d + c) + taken * load(b + c) + value * load(k + c);
                sums[j] += next * load(r + c);
                store_lanes(final_state + (i + j) * n, next, c, n);
            }
        }
        const Quad sum = sum_of_quads(quad_sums(sums[0], sums[1], sums[2], sums[3]));
        UNROLL for (int j = 0; j < 4; j++) y[i + j] = from_float<E>(sum[j]);
    }
}

// checkpoints: the first tile starts from `state`, the second's start goes to checkpoints[0], and so on; may be null.
template <class E>
void forward_head(float* memory, const Task& task, const Rows<const E>& rows, const float* state, E* y,
                  float* final_state, float* checkpoints) {
    const Values& values = task.values;
    const int64_t n = task.n, N = task.N, W = values.W;
    if (task.length == 1) return single_step(memory, task, rows, state, y, final_state);
    ForwardWork q(Parts(memory), N);
    const Chunk& chunk = q.chunk;
    load_state(chunk.S, N, state, n, values);
    for (int64_t start = 0; start < task.length; start += kChunk) {
        if (checkpoints && start && start % kTile == 0)
            save_state(checkpoints + (start / kTile - 1) * task.checkpoint, n, chunk.S, values);
        const int64_t left = task.length - start, steps = std::min<int64_t>(left, kChunk);
        prepare<false>(chunk, rows.at(start), steps, n, N, values);
        Ahead ahead;
        ahead.add(y + start * rows.stride, rows.stride, steps, n);
        rows.at(start + kChunk).ask(ahead, std::min<int64_t>(kChunk, left - kChunk), n);
        pair_products(chunk, q.turned, N, ahead);
        product<false>(q.reads, chunk.left, chunk.S, kStack, N, W, ahead, 3, Stored());
        solve_forward(chunk, q.reads, W);
        finish_forward(chunk, q.reads, y + start * rows.stride, rows.stride, steps, values);
        advance(chunk.S, chunk, q.turned, N, W, ahead);
    }
    store_state(final_state, n, chunk.S, values);
}

}  // namespace
