// The normalization of one head's values, and its derivative.
#pragma once
#include <cstdint>

#include "common/shuffles.h"

namespace {

// y (size), normalized; -> 1 / deviation.
template <class E>
inline float normalize(const E* y, int64_t size, float eps, float* normal) {
    Vec sum = zero(), squares = zero();
    for (int64_t c = 0; c < size; c += kLanes) sum += load_some(y + c, size - c);
    const float mean = total(sum) / size;
    for (int64_t c = 0; c < size; c += kLanes) {
        store_some(normal + c, load_some(y + c, size - c) - mean, size - c);
        const Vec x = load_some(normal + c, size - c);
        squares += x * x;
    }
    const float scale = 1.0f / __builtin_sqrtf(total(squares) / size + eps);
    for (int64_t c = 0; c < size; c += kLanes)
        store_some(normal + c, scale * load_some(normal + c, size - c), size - c);
    return scale;
}

// gy from the gradient d of the normalized values z, scale being what normalize returned.
template <class E>
inline void normalize_backward(const float* z, const float* d, int64_t size, float scale, E* gy) {
    Vec d_sum = zero(), along_sum = zero();
    for (int64_t c = 0; c < size; c += kLanes) {
        const Vec x = load_some(d + c, size - c);
        d_sum += x;
        along_sum += x * load_some(z + c, size - c);
    }
    const float mean = total(d_sum) / size, along = total(along_sum) / size;
    for (int64_t c = 0; c < size; c += kLanes)
        store_some(gy + c, scale * (load_some(d + c, size - c) - mean - along * load_some(z + c, size - c)), size - c);
}

}  // namespace
