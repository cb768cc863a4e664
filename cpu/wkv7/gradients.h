// Computes the gradients of a chunk's inputs.
#pragma once
#include "wkv7/triangles.h"

namespace {

// A chunk's gradients before this step: those of left and right without the terms between its steps, and those of the
// pairs.
struct Gradients {
    Matrix reads, writes, pairs;  // kStack x N twice; kStack x kStack
    float* later;                 // N: gradient of a decay's logarithm by all later steps
};

// The gradients of r, k, a, b and w of a chunk, in kLanes channels from c on, from those of left and right. They are
// sums over the values, linear in reads and writes, so that parts of the values add up.
template <bool whole, class Gradient>
INLINE void store_channels(const Gradients& q, const Chunk& chunk, const Rows<Gradient>& to, int64_t steps, int64_t c,
                           int64_t n) {
    const float *left = chunk.left.at(0, c), *right = chunk.right.at(0, c), *pairs = q.pairs.data;
    const float *reads = q.reads.at(0, c), *writes = q.writes.at(0, c);
    const float *incl = chunk.incl.at(0, c), *slope = chunk.slope.at(0, c);
    const auto put = [=](Gradient* rows, int t, Vec x) {
        if (whole || t < steps) store_lanes<whole>(rows + t * to.stride, x, c, n);
    };
    Vec now[kChunk], inv[kChunk];  // gradient of a decay's logarithm by its own step
    Sums<1> x;
    x.load_rows(reads + kSecond);
    x.template add_earlier<true>(qb(pairs), right);
    x.template add_earlier<true>(qk(pairs), right + kSecond);
    UNROLL for (int t = 0; t < kChunk; t++) {
        const Vec c_t = load(incl + t * kPanel);
        put(to.r, t, x.x[t][0] * c_t);
        now[t] = x.x[t][0] * load(left + kSecond + t * kPanel);
        inv[t] = reciprocal(c_t);
    }
    x.load_rows(writes + kSecond);
    x.template add_later<false>(ak(pairs), left);
    x.template add_later<true>(qk(pairs), left + kSecond);
    UNROLL for (int t = 0; t < kChunk; t++) {
        put(to.k, t, x.x[t][0] * inv[t]);
        now[t] -= x.x[t][0] * load(right + kSecond + t * kPanel);
    }
    x.load_rows(writes);
    x.template add_later<false>(ab(pairs), left);
    x.template add_later<true>(qb(pairs), left + kSecond);
    UNROLL for (int t = 0; t < kChunk; t++) {
        put(to.b, t, x.x[t][0] * inv[t]);
        now[t] -= x.x[t][0] * load(right + t * kPanel);
    }
    x.load_rows(reads);
    x.template add_earlier<false>(ab(pairs), right);
    x.template add_earlier<false>(ak(pairs), right + kSecond);
    Vec later = load(q.later + c);
    UNROLL for (int t = kChunk - 1; t >= 0; t--) {
        later += now[t];
        put(to.w, t, load(slope + t * kPanel) * later);
        put(to.a, t, t ? x.x[t][0] * load(incl + (t - 1) * kPanel) : x.x[t][0]);
        later += x.x[t][0] * load(left + t * kPanel);  // a reads what the steps before its own have faded
    }
}

// The same for all channels of the chunk's `steps` steps.
template <class Gradient>
void store_gradients(const Gradients& q, const Chunk& chunk, const Rows<Gradient>& to, int64_t steps, int64_t n,
                     int64_t N) {
    int64_t c = 0;
    if (steps == kChunk)
        for (; c + kLanes <= n; c += kLanes) store_channels<true>(q, chunk, to, steps, c, n);
    for (; c < N; c += kLanes) store_channels<false>(q, chunk, to, steps, c, n);
}

}  // namespace
