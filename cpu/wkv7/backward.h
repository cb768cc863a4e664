// Backward of one head of one sequence.
#pragma once
#include "wkv7/forward.h"

namespace {

struct BackwardWork {
    float *D, *turned_state, *S;  // the state's gradient, W x N; it turned; a chunk's state, W x N
    float *xg, *through;          // kStack x W: X and y's gradients; what the state after the chunk brings
    float *reads, *writes;        // kStack x N: gradients of a chunk's left and right
    float *gpairs, *turned;       // kStack x kStack; N x kStack
    Parts chunks;
    BackwardWork(Parts parts, int64_t N)
        : D(parts.take(N * N)),
          turned_state(parts.take(N * N)),
          S(parts.take(N * N)),
          xg(parts.take(kStack * N)),
          through(parts.take(kStack * N)),
          reads(parts.take(kStack * N)),
          writes(parts.take(kStack * N)),
          gpairs(parts.take(kStack * kStack)),
          turned(parts.take(kStack * N)),
          chunks(parts) {}
    static int64_t floats(int64_t N) {
        return 3 * N * N + 5 * kStack * N + kStack * kStack + 9 * Parts::kGap + kChunks * Chunk::floats(N);
    }
};

// The gradients that leave a chunk, kLanes channels at a time: from left's and right's to those of r, k, a, b, and by
// all that a decay fades to w's. Of all but v they are sums over the values, linear in reads and writes, so that those
// of some values add up to them.
template <class Gradient>
void store_gradients(const BackwardWork& q, const Chunk& chunk, const Task& task, const Rows<Gradient>& to, int steps,
                     const float* through) {
    const int64_t n = task.n, N = task.N;
    const int64_t second = kChunk * N;
    for (int64_t c = 0; c < n; c += kLanes) {
        Vec later = load(through + c);  // gradient of log decays, by what comes after
        for (int t = kChunk - 1; t >= 0; t--) {
            const int64_t at = t * N + c, to_step = t * to.stride;
            const Vec ga = load(q.reads + at), gr = load(q.reads + second + at);
            const Vec gb = load(q.writes + at), gk = load(q.writes + second + at);
            const Vec incl = load(chunk.incl + at), inv = load(chunk.inv + at);
            later += gr * load(chunk.left + second + at) - gk * load(chunk.right + second + at) -
                     gb * load(chunk.right + at);
            if (t < steps) {
                store_lanes(to.r + to_step, gr * incl, c, n);
                store_lanes(to.k + to_step, gk * inv, c, n);
                store_lanes(to.b + to_step, gb * inv, c, n);
                store_lanes(to.a + to_step, t ? ga * load(chunk.incl + at - N) : ga, c, n);
                store_lanes(to.w + to_step, load(chunk.slope + at) * later, c, n);
            }
            later += ga * load(chunk.left + at);  // a reads what the steps before its own have faded
        }
    }
    const Values& values = task.values;
    for (int t = 0; t < steps; t++)
        for (int64_t c = 0; c < values.W; c += kLanes)
            store_lanes(to.v + t * to.stride + values.first, load(q.through + (kChunk + t) * values.W + c), c,
                        values.count);
}

// gradient of log decays by what passes through the whole chunk: the state, and writes that are read after it.
inline void decays_after(float* out, const BackwardWork& q, const Chunk& chunk, int64_t N, int64_t W) {
    for (int64_t c = 0; c < N; c += kLanes) {
        Vec sum = zero();
        for (int64_t i = 0; i < W; i++) sum += load(q.S + i * N + c) * load(q.D + i * N + c);
        for (int t = 0; t < kStack; t++) sum += load(chunk.right + t * N + c) * load(q.writes + t * N + c);
        store(out + c, sum);
    }
}

template <class E, class Gradient>
void backward_chunk(BackwardWork& q, const Chunk& chunk, const Task& task, const E* gy, const Rows<Gradient>& to,
                    int steps, Ahead& ahead) {
    const Values& values = task.values;
    const int64_t N = task.N, W = values.W;
    for (int t = 0; t < kChunk; t++)
        for (int64_t c = 0; c < W; c += kLanes) {
            const E* row = gy + t * to.stride + values.first;
            store(q.xg + (kChunk + t) * W + c, gy && t < steps ? load_lanes(row, c, values.count) : zero());
        }
    scale_lanes(q.D, chunk.fade(N), W, N);
    transpose(q.turned_state, W, q.D, N, W, N);
    product<4>(q.through, chunk.right, q.turned_state, kStack, N, W, ahead, 1);
    solve_backward(chunk, q.xg, q.through, W);
    pair_products(q.gpairs, q.xg, chunk.uv, q.turned, W, ahead, 0);
    transpose(q.S, N, chunk.S, W, N, W);
    product<4>(q.reads, q.xg, q.S, kStack, W, N, ahead, 1);
    product<4>(q.writes, chunk.uv, q.D, kStack, W, N, ahead, 0);
    decays_after(q.turned, q, chunk, N, W);
    finish_backward(chunk, q.gpairs, q.reads, q.writes, N);
    store_gradients(q, chunk, task, to, steps, q.turned);
    add_outer(q.D, q.xg, chunk.left, W, N);
}

template <class E, class Gradient>
void backward_head(float* memory, const Task& task, const Rows<const E>& rows, const float* state,
                   const float* checkpoints, const E* gy, const float* gfinal, const Rows<Gradient>& to,
                   float* gstate) {
    const Values& values = task.values;
    const int64_t n = task.n, N = task.N, W = values.W;
    BackwardWork q(Parts(memory), N);
    load_state(q.D, N, gfinal, n, values);
    for (int64_t start = (task.length - 1) / kTile * kTile; start >= 0; start -= kTile) {
        const int64_t left = task.length - start, chunks = ((left < kTile ? left : kTile) + kChunk - 1) / kChunk;
        Parts parts = q.chunks;
        Chunk tile[kChunks] = {{parts, N}, {parts, N}, {parts, N}, {parts, N}};
        if (start)
            load_saved_state(tile[0].S, N, checkpoints + (start / kTile - 1) * task.checkpoint, n, values);
        else
            load_turned_state(tile[0].S, N, state, n, values);
        Ahead outputs;
        to.at(start).ask(outputs, std::min<int64_t>(kTile, left), n);
        for (int64_t m = 0; m < chunks; m++) {
            const Chunk& chunk = tile[m];
            prepare<E>(chunk, rows.at(start + m * kChunk), std::min<int64_t>(kChunk, left - m * kChunk), n, N, values);
            pair_products(chunk.pairs, chunk.left, chunk.right, q.turned, N, outputs, 2);
            product<4>(q.reads, chunk.left, chunk.S, kChunk, N, W, outputs, 2);
            solve_forward(chunk, q.reads, W);
            if (m + 1 == chunks) break;
            memcpy(tile[m + 1].S, chunk.S, sizeof(float) * N * W);
            advance(tile[m + 1].S, chunk, N, W);
        }
        Ahead inputs;
        if (start) {
            const int64_t previous = start - kTile;
            rows.at(previous).ask(inputs, kTile, n);
            if (gy) inputs.add(gy + previous * rows.stride, rows.stride, kTile, n);
            inputs.add(previous ? checkpoints + (previous / kTile - 1) * task.checkpoint : state, n, n, n);
        }
        for (int64_t m = chunks - 1; m >= 0; m--) {
            const int64_t first = start + m * kChunk, steps = left - m * kChunk < kChunk ? left - m * kChunk : kChunk;
            backward_chunk(q, tile[m], task, gy ? gy + first * rows.stride : nullptr, to.at(first), steps, inputs);
        }
    }
    store_state(gstate, n, q.D, N, values);
}

}  // namespace
