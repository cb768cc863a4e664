// What a step computes between its products, if cpu/mix has no kernel for it: the norm of a residual stream, and
// functions of the few numbers between two small matrices. To wake a thread would take longer.
#pragma once
#include <cmath>

#include "common/bfloat16.h"
#include "common/exp.h"
#include "common/shuffles.h"
#include "decode/arguments.h"

namespace {

template <class E>
void norm_rows(const NormArguments& a, E* x, const E* add, const E* weight, const E* bias, E* y) {
    const int64_t n = a.channels;
    for (int64_t row = 0; row < a.rows; row++, x += n, y += n) {
        Vec sum = zero(), square = zero();
        for (int64_t c = 0; c < n; c += kLanes) {
            Vec value = load_some(x + c, n - c);
            if (add) store_some(x + c, value + load_some(add + row * n + c, n - c), n - c);
            sum += load_some(x + c, n - c);
        }
        const float mean = total(sum) / n;
        int64_t c = 0;
        for (; c + kLanes <= n; c += kLanes) {
            const Vec apart = load(x + c) - mean;
            square += apart * apart;
        }
        float squares = total(square);
        for (; c < n; c++) squares += (to_float(x[c]) - mean) * (to_float(x[c]) - mean);
        const float scale = 1.0f / std::sqrt(squares / n + a.eps);
        for (c = 0; c < n; c++)
            y[c] = from_float<E>((to_float(x[c]) - mean) * scale * to_float(weight[c]) + to_float(bias[c]));
    }
}

template <class E>
void elements(const ElementArguments& a, E* x, const E* bias) {
    for (int64_t row = 0; row < a.rows; row++, x += a.channels)
        for (int64_t c = 0; c < a.channels; c++) {
            float value = to_float(x[c]) + (bias ? to_float(bias[c]) : 0.0f);
            if (a.kind == 1) value = std::tanh(value);
            if (a.kind == 2) value = sigmoid(value);
            x[c] = from_float<E>(value);
        }
}

}  // namespace
