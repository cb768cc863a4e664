// Gates of single elements: out = sigmoid(r) v, and out = max(x, 0)^2.
#pragma once
#include <cstdint>

#include "common/bfloat16.h"
#include "common/exp.h"
#include "common/threads.h"

namespace {

template <class E>
void sigmoid_gate_forward(const E* r, const E* v, E* out, int64_t count, int threads) {
    parallel(count, count, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i++) out[i] = from_float<E>(sigmoid(to_float(r[i])) * to_float(v[i]));
    });
}

template <class E>
void sigmoid_gate_backward(const E* r, const E* v, const E* grad, E* gr, E* gv, int64_t count, int threads) {
    parallel(count, count, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i++) {
            const float s = sigmoid(to_float(r[i])), g = to_float(grad[i]);
            gv[i] = from_float<E>(g * s);
            gr[i] = from_float<E>(g * to_float(v[i]) * s * (1.0f - s));
        }
    });
}

template <class E>
void relu_square_forward(const E* x, E* out, int64_t count, int threads) {
    parallel(count, count, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i += kLanes) {
            const Vec a = load_some(x + i, end - i), positive = a < 0.0f ? zero() : a;
            store_some(out + i, positive * positive, end - i);
        }
    });
}

// From out, which a linear layer may keep in any case, rather than from x: 2 max(x, 0) = 2 sqrt(out).
template <class E>
void relu_square_backward(const E* out, const E* grad, E* gx, int64_t count, int threads) {
    parallel(count, count, threads, [=](int64_t first, int64_t end, int) {
        for (int64_t i = first; i < end; i += kLanes) {
            const Vec root = square_root(load_some(out + i, end - i));
            store_some(gx + i, 2.0f * root * load_some(grad + i, end - i), end - i);
        }
    });
}

}  // namespace
