// The normalization of heads and their gate: out = (normalized y * weight + bias) silu(g), normalized within each head.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/bfloat16.h"
#include "common/exp.h"
#include "common/threads.h"
#include "mix/sums.h"

namespace {

// y, g, out (tokens, heads * size), weight, bias (heads * size).
template <class E>
struct NormGate {
    const E *y, *g, *weight, *bias;
    int64_t tokens, heads, size;
    float eps;

    // One head's normalized values (from position p of the tensors on); -> 1 / deviation.
    float normalize(int64_t p, float* normal) const {
        float sum = 0.0f, squares = 0.0f;
        for (int64_t c = 0; c < size; c++) normal[c] = to_float(y[p + c]);
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < size; c++) sum += normal[c];
        const float mean = sum / size;
        for (int64_t c = 0; c < size; c++) normal[c] -= mean;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < size; c++) squares += normal[c] * normal[c];
        const float scale = 1.0f / __builtin_sqrtf(squares / size + eps);
        for (int64_t c = 0; c < size; c++) normal[c] *= scale;
        return scale;
    }

    void forward(E* out, int threads) const {
        const int64_t width = heads * size;
        parallel(tokens, tokens * width, threads, [&](int64_t first, int64_t end, int) {
            std::vector<float> normal(size);
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < width; h += size) {
                    const int64_t p = t * width + h;
                    float* z = normal.data();
                    normalize(p, z);
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
        const int64_t width = heads * size;
        std::vector<float> weight_sums(gweight ? width * std::max(1, threads) : 0, 0.0f), bias_sums(weight_sums);
        parallel(tokens, tokens * width, threads, [&](int64_t first, int64_t end, int thread) {
            std::vector<float> normal(size), inner(size);
            float *z = normal.data(), *d = inner.data();
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < width; h += size) {
                    const int64_t p = t * width + h;
                    const float scale = normalize(p, z);
                    for (int64_t c = 0; c < size; c++) {
                        const float gate = to_float(g[p + c]), s = sigmoid(gate), dout = to_float(grad[p + c]);
                        const float affine = z[c] * to_float(weight[h + c]) + to_float(bias[h + c]);
                        gg[p + c] = from_float<E>(dout * affine * s * (1.0f + gate * (1.0f - s)));
                        d[c] = dout * gate * s;
                    }
                    if (gweight) {
                        float *w = weight_sums.data() + thread * width + h, *b = bias_sums.data() + thread * width + h;
                        for (int64_t c = 0; c < size; c++) w[c] += d[c] * z[c], b[c] += d[c];
                    }
                    float mean = 0.0f, along = 0.0f;
                    for (int64_t c = 0; c < size; c++) d[c] *= to_float(weight[h + c]);
#pragma omp simd reduction(+ : mean, along)
                    for (int64_t c = 0; c < size; c++) mean += d[c], along += d[c] * z[c];
                    mean /= size, along /= size;
                    for (int64_t c = 0; c < size; c++) gy[p + c] = from_float<E>(scale * (d[c] - mean - z[c] * along));
                }
        });
        if (gweight) add_up(gweight, weight_sums, width), add_up(gbias, bias_sums, width);
    }
};

}  // namespace
