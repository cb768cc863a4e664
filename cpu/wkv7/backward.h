// Backward of one head of one sequence.
#pragma once
#include "wkv7/forward.h"
#include "wkv7/gradients.h"

namespace {

struct BackwardWork {
    Matrix D, after;                  // the state's gradient and the state after a sequence, N x W
    Matrix xg, turned_xg, turned_uv;  // X, then y's gradients, kStack x W; it and a chunk's uv turned
    Matrix through;                   // uv's gradient through the state after the chunk, kStack x W
    Matrix turned;                    // a stack before it is turned, N x kStack
    Gradients gradients;
    Parts chunks;
    BackwardWork(Parts parts, int64_t N)
        : D(parts.take(N + kApart, N)),
          after(parts.take(N + kApart, N)),
          xg(parts.take(kStack, N)),
          turned_xg(parts.take(N, kStack)),
          turned_uv(parts.take(N, kStack)),
          through(parts.take(kStack, N)),
          turned(parts.take(N, kStack)),
          gradients{parts.take(kStack, N), parts.take(kStack, N), parts.take(kStack, kStack), parts.take(1, N).data},
          chunks(parts) {}
    static int64_t floats(int64_t N) {
        return 2 * Parts::floats(N + kApart, N) + 7 * Parts::floats(kStack, N) + Parts::floats(kStack, kStack) +
               Parts::floats(1, N) + kChunks * Chunk::floats(N);
    }
};

// Changes made to the gradient of the state before a chunk. `later`, the gradient of the logarithms of all earlier
// decays, is the product of its elements with the state's, summed over the values. Then it is faded by the decays of
// the chunk before, if the tile has one.
struct Faded : Added {
    const Matrix S;
    float* later;
    const Chunk* before;
    Faded(const Matrix& S, float* later, const Chunk* before) : S(S), later(later), before(before) {}

    template <int M, int V>
    INLINE void change(Vec (*sum)[M], int64_t m, int64_t c) const {
        static_assert(M == 4, "a quad of rows");
        const float* state = S.at(m, c);
        const int64_t next = S.next_vector();
        Vec total[4] = {};
        UNROLL for (int v = 0; v < V; v++)
            UNROLL for (int i = 0; i < 4; i++) total[i] += load(state + v * next + i * kPanel) * sum[v][i];
        const Quad totals = sum_of_quads(quad_sums(total[0], total[1], total[2], total[3]));
        store_quad(later + m, c ? load_quad(later + m) + totals : totals);
        if (!before) return;
        const float* factors = before->fade().at(0, m);
        UNROLL for (int i = 0; i < 4; i++) {
            const Vec factor = broadcast(factors[i]);
            UNROLL for (int v = 0; v < V; v++) sum[v][i] *= factor;
        }
    }
};

// `later` at a sequence's end, from the state there.
inline void sum_later(float* later, const Matrix& S, const Matrix& D, int64_t N, int64_t W) {
    for (int64_t m = 0; m < N; m++) {
        Vec sum = zero();
        for (int64_t c = 0; c < W; c += kLanes) sum += load(S.at(m, c)) * load(D.at(m, c));
        later[m] = total(sum);
    }
}

inline void fade_rows(const Matrix& D, const Matrix& fade, int64_t N, int64_t W) {
    for (int64_t c = 0; c < W; c += kLanes)
        for (int64_t m = 0; m < N; m++) store(D.at(m, c), load(D.at(m, c)) * broadcast(*fade.at(0, m)));
}

// before: the chunk before in the tile, or null. Instead of S and D, the products with them are turned, because stacks
// are smaller.
template <class E, class Gradient>
void backward_chunk(const BackwardWork& q, const Chunk& chunk, const Task& task, const E* gy,
                    const Rows<Gradient>& to, int64_t steps, const Chunk* before, Ahead& ahead) {
    const Values& values = task.values;
    const int64_t N = task.N, W = values.W;
    const Gradients& g = q.gradients;
    load_second(q.xg, gy, to.stride, steps, values);
    product<false>(q.through, chunk.right, q.D, kStack, N, W, ahead, 2, Stored());
    solve_backward(chunk, q.xg, q.through, to.v, to.stride, steps, values);
    transpose(q.turned_uv, chunk.uv, kStack, W);
    product<false, kTall>(g.pairs, q.xg, q.turned_uv, kStack, W, kStack, ahead, 2, Stored());
    product<false, kTall>(q.turned, q.D, q.turned_uv, N, W, kStack, ahead, 2, Stored());
    transpose(g.writes, q.turned, N, kStack);
    transpose(q.turned_xg, q.xg, kStack, W);
    product<false, kTall>(q.turned, chunk.S, q.turned_xg, N, W, kStack, ahead, 2, Stored());
    transpose(g.reads, q.turned, N, kStack);
    store_gradients(g, chunk, to, steps, task.n, N);
    product<true>(q.D, chunk.left, q.xg, N, kStack, W, ahead, 2, Faded(chunk.S, g.later, before));
}

// A tile's chunks, each with the state before it and its uv; `last`, unless null, receives the state after the tile.
template <class E>
void recompute(const BackwardWork& q, const Chunk* tile, int64_t chunks, const Task& task, const Rows<const E>& rows,
               int64_t steps, const Matrix* last, Ahead& ahead) {
    const int64_t N = task.N, W = task.values.W;
    for (int64_t m = 0; m < chunks; m++) {
        const Chunk& chunk = tile[m];
        prepare<true>(chunk, rows.at(m * kChunk), steps - m * kChunk, task.n, N, task.values);
        pair_products(chunk, q.turned, N, ahead);
        product<false>(q.through, chunk.left, chunk.S, kChunk, N, W, ahead, 3, Stored());
        solve_forward(chunk, q.through, W);
        const Matrix* const after = m + 1 < chunks ? &tile[m + 1].S : last;
        if (after) advance(*after, chunk, q.turned, N, W, ahead);
    }
}

template <class E, class Gradient>
void backward_head(float* memory, const Task& task, const Rows<const E>& rows, const float* state,
                   const float* checkpoints, const E* gy, const float* gfinal, const Rows<Gradient>& to,
                   float* gstate) {
    const Values& values = task.values;
    const int64_t n = task.n, N = task.N, W = values.W;
    BackwardWork q(Parts(memory), N);
    float* const later = q.gradients.later;
    memset(later, 0, sizeof(float) * N);
    load_state(q.D, N, gfinal, n, values);
    for (int64_t start = (task.length - 1) / kTile * kTile; start >= 0; start -= kTile) {
        const int64_t left = std::min<int64_t>(task.length - start, kTile), chunks = (left + kChunk - 1) / kChunk;
        Parts parts = q.chunks;
        const Chunk tile[kChunks] = {{parts, N}, {parts, N}, {parts, N}, {parts, N},
                                     {parts, N}, {parts, N}, {parts, N}, {parts, N}};
        if (start)
            load_saved_state(tile[0].S, N, checkpoints + (start / kTile - 1) * task.checkpoint, n, values);
        else
            load_state(tile[0].S, N, state, n, values);
        Ahead outputs;
        to.at(start).ask(outputs, left, n);
        const bool final = gfinal && start + left == task.length;
        recompute(q, tile, chunks, task, rows.at(start), left, final ? &q.after : nullptr, outputs);
        if (final) sum_later(later, q.after, q.D, N, W);
        fade_rows(q.D, tile[chunks - 1].fade(), N, W);
        Ahead inputs;
        if (start) {
            const int64_t previous = start - kTile;
            rows.at(previous).ask(inputs, kTile, n);
            if (gy) inputs.add(gy + previous * rows.stride, rows.stride, kTile, n);
            inputs.add(previous ? checkpoints + (previous / kTile - 1) * task.checkpoint : state, n, n, n);
        }
        for (int64_t m = chunks - 1; m >= 0; m--) {
            const int64_t first = start + m * kChunk, steps = std::min<int64_t>(left - m * kChunk, kChunk);
            backward_chunk(q, tile[m], task, gy ? gy + first * rows.stride : nullptr, to.at(first),
                           steps, m ? &tile[m - 1] : nullptr, inputs);
        }
    }
    store_state(gstate, n, q.D, values);
}

}  // namespace
