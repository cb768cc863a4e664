// RWKV-6's normalization of heads and their gate: out = (normalized y * weight + bias) silu(g), normalized within each
// head.
#pragma once
#include <cstdint>
#include <vector>

#include "common/exp.h"
#include "common/threads.h"
#include "mix/normalize.h"
#include "mix/sums.h"

namespace {

// y, g, out (tokens, channels), weight, bias (channels).
template <class E>
struct NormGate {
    const E *y, *g, *weight, *bias;
    int64_t tokens, channels, size;  // size: a head's channels
    float eps;

    void forward(E* out, int threads) const {
        parallel(tokens, tokens * channels, threads, [&](int64_t first, int64_t end, int) {
            std::vector<float> normal(size);
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < channels; h += size) {
                    const int64_t p = t * channels + h;
                    float* z = normal.data();
                    normalize(y + p, size, eps, z);
                    for (int64_t c = 0; c < size; c++) {
                        const float gate = to_float(g[p + c]);
                        const float affine = z[c] * to_float(weight[h + c]) + to_float(bias[h + c]);
                        out[p + c] = from_float<E>(affine * gate * sigmoid(gate));
                    }
                }
        });
    }

    // gweight and gbias are float, and both null or neither.
    void backward(const E* grad, E* gy, E* gg, float* gweight, float* gbias, int threads) const {
        Sums weight_sums(gweight, channels, threads), bias_sums(gbias, channels, threads);
        parallel(tokens, tokens * channels, threads, [&](int64_t first, int64_t end, int thread) {
            std::vector<float> normal(size), inner(size);
            float *z = normal.data(), *d = inner.data();
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < channels; h += size) {
                    const int64_t p = t * channels + h;
                    const float scale = normalize(y + p, size, eps, z);
                    for (int64_t c = 0; c < size; c++) {
                        const float gate = to_float(g[p + c]), s = sigmoid(gate), dout = to_float(grad[p + c]);
                        const float affine = z[c] * to_float(weight[h + c]) + to_float(bias[h + c]);
                        gg[p + c] = from_float<E>(dout * affine * s * (1.0f + gate * (1.0f - s)));
                        d[c] = dout * gate * s;
                    }
                    if (gweight) {
                        float *w = weight_sums.of(thread, h), *b = bias_sums.of(thread, h);
                        for (int64_t c = 0; c < size; c++) w[c] += d[c] * z[c], b[c] += d[c];
                    }
                    for (int64_t c = 0; c < size; c++) d[c] *= to_float(weight[h + c]);
                    normalize_backward(z, d, size, scale, gy + p);
                }
        });
        weight_sums.add_up();
        bias_sums.add_up();
    }
};

}  // namespace
