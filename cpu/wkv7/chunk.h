// A chunk of 16 steps of one head: its operands in floats, from rows of a tensor.
#pragma once
#include <initializer_list>

#include "common/exp.h"
#include "common/prefetch.h"
#include "common/scratch.h"
#include "common/vectors.h"

namespace {

constexpr int kChunk = 16, kTile = 64;  // steps: of a chunk, and from one saved state to the next
constexpr int kChunks = kTile / kChunk;
constexpr int kStack = 2 * kChunk;              // rows of two arrays that share products
constexpr float kDecayScale = -0.60653065971f;  // -e^(-1/2): log decay = kDecayScale sigmoid(w)

// Hands out parts of a piece of memory. The gap after each keeps arrays that are walked in step from lying a multiple
// of 4 KB apart, where a processor takes loads for dependent on earlier stores.
class Parts {
  public:
    explicit Parts(float* memory) : memory_(memory) {}
    float* take(int64_t count) {
        float* part = memory_;
        memory_ += count + kGap;
        return part;
    }
    static constexpr int64_t kGap = 5 * 16;

  private:
    float* memory_;
};

// Some values of a head, all of them where threads are few: `count` from `first` on, in rows of W floats.
struct Values { int64_t first, count, W; };

// Rows of N floats, of uv and S of W, zeros past the head size. With c the product of the decays since the chunk's
// start:
struct Chunk {
    float* left;   // a c_{t-1}, then r c_t
    float* right;  // b / c_t, then k / c_t
    float* uv;     // S_{t-1} a_t, then v
    float* incl;   // c_t
    float* inv;    // 1 / c_t
    float* slope;  // derivative of a step's log decay by w
    float* pairs;  // left right^T, kStack x kStack
    float* S;      // the state before the chunk, rows keys

    static constexpr int kArrays = 8;
    static int64_t floats(int64_t N) {
        return 3 * kStack * N + 3 * kChunk * N + kStack * kStack + N * N + kArrays * Parts::kGap;
    }
    Chunk(Parts& parts, int64_t N)
        : left(parts.take(kStack * N)),
          right(parts.take(kStack * N)),
          uv(parts.take(kStack * N)),
          incl(parts.take(kChunk * N)),
          inv(parts.take(kChunk * N)),
          slope(parts.take(kChunk * N)),
          pairs(parts.take(kStack * kStack)),
          S(parts.take(N * N)) {}

    const float* fade(int64_t N) const { return incl + (kChunk - 1) * N; }  // all decays of the chunk
};

// Lanes c and on of a row of n elements, zeros past its end.
template <class E>
INLINE Vec load_lanes(const E* row, int64_t c, int64_t n) {
    return c < n ? load_some(row + c, n - c) : zero();
}
template <class E>
INLINE void store_lanes(E* row, Vec x, int64_t c, int64_t n) {
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

// w of a chunk's steps, kLanes channels -> logarithms of the decays' products up to each step, and the slopes.
INLINE void log_decays(Vec* w, Vec* slope, int steps) {
    UNROLL for (int t = 0; t < kChunk; t++) {
        const Vec negative = reinterpret_cast<Vec>(reinterpret_cast<VecBits>(w[t]) | 0x80000000u);  // -|w|
        slope[t] = at_least(negative, -kLargestExponent);
    }
    for (int t = 0; t < kChunk; t += 4) exp_bounded<4>(slope + t);
    Vec sum = zero();
    for (int t = 0; t < kChunk; t++) {
        // sigmoid(|w|) and sigmoid(-|w|), the smaller without a difference, which would lose its digits
        const Vec large = 1.0f / (1.0f + slope[t]), small = slope[t] * large;
        slope[t] = kDecayScale * (large * small);
        if (t < steps) sum += kDecayScale * (w[t] < 0.0f ? small : large);
        w[t] = sum;
    }
}

// A chunk's operands, from rows of n elements; steps past the sequence's end leave the state alone.
template <class E>
void prepare(const Chunk& q, const Rows<const E>& rows, int steps, int64_t n, int64_t N, const Values& values) {
    steps = steps < kChunk ? steps : kChunk;
    for (int64_t c = 0; c < N; c += kLanes) {
        Vec log[kChunk], slope[kChunk];
        for (int t = 0; t < kChunk; t++) log[t] = t < steps ? load_lanes(rows.w + t * rows.stride, c, n) : zero();
        log_decays(log, slope, steps);
        for (int t = 0; t < kChunk; t += 4) exp_bounded<4>(log + t);
        Vec before = broadcast(1.0f);
        for (int t = 0; t < kChunk; t++) {
            const Vec incl = log[t], inv = 1.0f / incl;
            const int64_t at = t * N + c, second = at + kChunk * N, from = t * rows.stride;
            const bool present = t < steps;
            store(q.left + at, present ? load_lanes(rows.a + from, c, n) * before : zero());
            store(q.left + second, present ? load_lanes(rows.r + from, c, n) * incl : zero());
            store(q.right + at, present ? load_lanes(rows.b + from, c, n) * inv : zero());
            store(q.right + second, present ? load_lanes(rows.k + from, c, n) * inv : zero());
            store(q.incl + at, incl);
            store(q.inv + at, inv);
            store(q.slope + at, slope[t]);
            before = incl;
        }
    }
    const int64_t W = values.W;
    for (int t = 0; t < kChunk; t++)
        for (int64_t c = 0; c < W; c += kLanes) {
            const E* v = rows.v + t * rows.stride + values.first;
            store(q.uv + (kChunk + t) * W + c, t < steps ? load_lanes(v, c, values.count) : zero());
        }
}

}  // namespace
