// The steps after RWKV-7's recurrence: normalize its reads within each head, add the current token's bonus, and gate:
//
//     out = (normalized y * weight + bias + s v) g,    s = sum over the head of r k r_k
#pragma once
#include <cstdint>
#include <vector>

#include "common/threads.h"
#include "mix/normalize.h"
#include "mix/sums.h"

namespace {

// y, r, k, v, g, out (tokens, channels); r_k, weight, bias (channels).
template <class E>
struct NormBonusGate {
    const E *y, *r, *k, *v, *g, *r_k, *weight, *bias;
    int64_t tokens, channels, size;  // size: a head's channels
    float eps;

    // s of the head at position p of the tensors and h of the parameters.
    float bonus(int64_t p, int64_t h) const {
        Vec sum = zero();
        for (int64_t c = 0; c < size; c += kLanes)
            sum += load_some(r + p + c, size - c) * load_some(k + p + c, size - c) * load_some(r_k + h + c, size - c);
        return total(sum);
    }

    // kLanes channels of normalized y * weight + bias + s v; z the normalized values.
    Vec whole(Vec z, float s, int64_t p, int64_t h, int64_t left) const {
        return z * load_some(weight + h, left) + load_some(bias + h, left) + s * load_some(v + p, left);
    }

    void forward(E* out, int threads) const {
        parallel(tokens, tokens * channels, threads, [&](int64_t first, int64_t end, int) {
            std::vector<float> normal(size);
            float* z = normal.data();
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < channels; h += size) {
                    const int64_t p = t * channels + h;
                    normalize(y + p, size, eps, z);
                    const float s = bonus(p, h);
                    for (int64_t c = 0; c < size; c += kLanes) {
                        const int64_t left = size - c;
                        const Vec x = whole(load_some(z + c, left), s, p + c, h + c, left);
                        store_some(out + p + c, x * load_some(g + p + c, left), left);
                    }
                }
        });
    }

    // Places for the gradients; those of the parameters are float, and all null or none.
    struct Gradients {
        E *y, *r, *k, *v, *g;
        float *r_k, *weight, *bias;
    };

    void backward(const E* grad, const Gradients& to, int threads) const {
        Sums r_k_sums(to.r_k, channels, threads), weight_sums(to.weight, channels, threads),
            bias_sums(to.bias, channels, threads);
        parallel(tokens, tokens * channels, threads, [&](int64_t first, int64_t end, int thread) {
            std::vector<float> buffers(2 * size);
            float *z = buffers.data(), *d = z + size;
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < channels; h += size) {
                    const int64_t p = t * channels + h;
                    const float scale = normalize(y + p, size, eps, z), s = bonus(p, h);
                    Vec products = zero();
                    for (int64_t c = 0; c < size; c += kLanes) {
                        const int64_t left = size - c;
                        const Vec dout = load_some(grad + p + c, left), normal = load_some(z + c, left);
                        const Vec gx = dout * load_some(g + p + c, left);
                        store_some(to.g + p + c, dout * whole(normal, s, p + c, h + c, left), left);
                        store_some(to.v + p + c, gx * s, left);
                        products += gx * load_some(v + p + c, left);
                        store_some(d + c, gx * load_some(weight + h + c, left), left);
                        if (!to.r_k) continue;
                        add_some(weight_sums.of(thread, h + c), gx * normal, left);
                        add_some(bias_sums.of(thread, h + c), gx, left);
                    }
                    normalize_backward(z, d, size, scale, to.y + p);
                    const float gs = total(products);
                    for (int64_t c = 0; c < size; c += kLanes) {
                        const int64_t left = size - c;
                        const Vec read = load_some(r + p + c, left), key = load_some(k + p + c, left);
                        const Vec share = gs * load_some(r_k + h + c, left);
                        store_some(to.r + p + c, share * key, left);
                        store_some(to.k + p + c, share * read, left);
                        if (to.r_k) add_some(r_k_sums.of(thread, h + c), gs * read * key, left);
                    }
                }
        });
        r_k_sums.add_up();
        weight_sums.add_up();
        bias_sums.add_up();
    }
};

}  // namespace
