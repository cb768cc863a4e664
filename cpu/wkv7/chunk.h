// A chunk of 8 steps of one head: its operands in floats, from rows of a tensor.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "common/exp.h"
#include "common/scratch.h"
#include "wkv7/panels.h"

namespace {

constexpr int kChunk = 8, kTile = 64;  // steps: of a chunk, and from one saved state to the next
constexpr int kChunks = kTile / kChunk;
constexpr int kStack = 2 * kChunk;              // rows of two arrays that share products, one after the other
constexpr int64_t kSecond = kChunk * kPanel;    // from a row of the first to that of the second
constexpr float kDecayScale = -0.60653065971f;  // -e^(-1/2): log decay = kDecayScale sigmoid(w)

// Hands out parts of a piece of memory. The gap after each keeps arrays that are walked in step from being a multiple
// of 4 KB apart, because a processor would take loads for dependent on earlier stores there.
class Parts {
  public:
    explicit Parts(float* memory) : memory_(memory) {}
    Matrix take(int64_t rows, int64_t columns) {
        float* part = memory_;
        memory_ += floats(rows, columns);
        return {part, rows};
    }
    static int64_t floats(int64_t rows, int64_t columns) { return rows * columns + 5 * kPanel; }

  private:
    float* memory_;
};

// Some values of a head, or all of them if threads are few: `count` from `first` on, in rows of W floats.
struct Values { int64_t first, count, W; };

constexpr int64_t kApart = 4;  // spare rows of a state, lest its panels begin a multiple of 4 KB apart

// Matrices of N columns (uv and S: W), zeros past the head size. With c the product of the decays since the chunk's
// start:
struct Chunk {
    Matrix left;   // a c_{t-1}, then r c_t
    Matrix right;  // b / c_t, then k / c_t
    Matrix uv;     // S_{t-1} a_t, then v
    Matrix incl;   // c_t; only that of the last step if no backward follows
    Matrix slope;  // derivative of a step's log decay by w, for backward
    Matrix pairs;  // left right^T
    Matrix S;      // the state before the chunk, rows keys

    static int64_t floats(int64_t N) {
        return 3 * Parts::floats(kStack, N) + 2 * Parts::floats(kChunk, N) + Parts::floats(kStack, kStack) +
               Parts::floats(N + kApart, N);
    }
    Chunk(Parts& parts, int64_t N)
        : left(parts.take(kStack, N)),
          right(parts.take(kStack, N)),
          uv(parts.take(kStack, N)),
          incl(parts.take(kChunk, N)),
          slope(parts.take(kChunk, N)),
          pairs(parts.take(kStack, kStack)),
          S(parts.take(N + kApart, N)) {}

    Matrix fade() const { return incl.from(kChunk - 1); }  // a row: all decays of the chunk
};

// Lanes c and on of a row of n elements, zeros past its end; `whole` says that there are enough.
template <bool whole = false, class E>
INLINE Vec load_lanes(const E* row, int64_t c, int64_t n) {
    if constexpr (whole) return load(row + c);
    return c < n ? load_some(row + c, n - c) : zero();
}
template <bool whole = false, class E>
INLINE void store_lanes(E* row, Vec x, int64_t c, int64_t n) {
    if constexpr (whole) return store(row + c, x);
    if (c < n) store_some(row + c, x, n - c);
}

// Rows of one head in the six tensors, `stride` elements from one step to the next.
template <class E>
struct Rows {
    E *r, *w, *k, *v, *a, *b;
    int64_t stride;

    Rows at(int64_t step) const {
        const int64_t x = step * stride;
        return {r + x, w + x, k + x, v + x, a + x, b + x, stride};
    }
    // Asks for `steps` steps of n elements.
    void ask(Ahead& ahead, int64_t steps, int n) const {
        for (E* row : {r, w, k, v, a, b}) ahead.add(row, stride, steps, n);
    }
};

// w of kCount vectors -> decays, and the slopes of their logarithms.
template <int kCount>
INLINE void decays(Vec* w, Vec* slope) {
    UNROLL for (int i = 0; i < kCount; i++) w[i] = at_most(at_least(-w[i], -kLargestExponent), kLargestExponent);
    exp_bounded<kCount>(w);
    UNROLL for (int i = 0; i < kCount; i++) {
        const Vec x = reciprocal(1.0f + w[i]);  // sigmoid(w); w times it is sigmoid(-w), with all its digits
        slope[i] = kDecayScale * x * (w[i] * x);
        Vec p = x * 5.25714895e-5f - 6.64896099e-4f;  // exp(kDecayScale x) within 1e-8, and exactly 1 at 0
        for (const float coefficient : {5.62840886e-3f, -3.71857174e-2f, 0.183939517f, kDecayScale, 1.0f})
            p = p * x + coefficient;
        w[i] = p;
    }
}

// V vectors of channels from c on of a chunk's operands; kept: for a backward.
template <bool kept, bool whole, int V, class E>
INLINE void prepare_lanes(const Chunk& q, const Rows<const E>& rows, int64_t steps, int64_t c, int64_t n) {
    constexpr int64_t kNext = kLanes < kPanel ? kLanes : kStack * kPanel;
    constexpr int64_t kNextSingle = kLanes < kPanel ? kLanes : kChunk * kPanel;
    Vec before[V];
    UNROLL for (int v = 0; v < V; v++) before[v] = broadcast(1.0f);
    for (int t = 0; t < kChunk; t++) {
        float *left = q.left.at(t, c), *right = q.right.at(t, c), *incl = q.incl.at(t, c), *slope = q.slope.at(t, c);
        if (t >= steps) {  // past the sequence's end: the state must not change
            UNROLL for (int v = 0; v < V; v++) {
                for (float* row : {left, left + kSecond, right, right + kSecond}) store(row + v * kNext, zero());
                if (kept) store(incl + v * kNextSingle, before[v]);
            }
            continue;
        }
        const int64_t from = t * rows.stride;
        Vec decay[V], slopes[V];
        UNROLL for (int v = 0; v < V; v++) decay[v] = load_lanes<whole>(rows.w + from, c + v * kLanes, n);
        decays<V>(decay, slopes);
        UNROLL for (int v = 0; v < V; v++) {
            const int64_t at = c + v * kLanes;
            const Vec product = before[v] * decay[v], inv = reciprocal(product);
            store(left + v * kNext, load_lanes<whole>(rows.a + from, at, n) * before[v]);
            store(left + kSecond + v * kNext, load_lanes<whole>(rows.r + from, at, n) * product);
            store(right + v * kNext, load_lanes<whole>(rows.b + from, at, n) * inv);
            store(right + kSecond + v * kNext, load_lanes<whole>(rows.k + from, at, n) * inv);
            if (kept) store(incl + v * kNextSingle, product);
            if (kept) store(slope + v * kNextSingle, slopes[v]);
            before[v] = product;
        }
    }
    if (!kept)
        UNROLL for (int v = 0; v < V; v++) store(q.fade().at(0, c + v * kLanes), before[v]);
}

// Copies the values' channels of a tensor's rows to the second rows of a stack; zeros past `steps`, or for null.
template <class E>
void load_second(const Matrix& stack, const E* rows, int64_t stride, int64_t steps, const Values& values) {
    for (int t = 0; t < kChunk; t++)
        for (int64_t c = 0; c < values.W; c += kLanes)
            store(stack.at(kChunk + t, c),
                  rows && t < steps ? load_lanes(rows + t * stride + values.first, c, values.count) : zero());
}

// A chunk's operands, from rows of n elements, `steps` of them or kChunk.
template <bool kept, class E>
void prepare(const Chunk& q, const Rows<const E>& rows, int64_t steps, int64_t n, int64_t N, const Values& values) {
    constexpr int kMost = kLanes == 16 ? 4 : 2;
    int64_t c = 0;
    for (; c + kMost * kLanes <= n; c += kMost * kLanes) prepare_lanes<kept, true, kMost>(q, rows, steps, c, n);
    for (; c < N; c += kLanes) prepare_lanes<kept, false, 1>(q, rows, steps, c, n);
    load_second(q.uv, rows.v, rows.stride, steps, values);
}

}  // namespace
