// RWKV-7's keys (arXiv 2503.14456, section 4): those that its delta rule writes at and removes, made from one key k:
//
//     rate = sigmoid(a0 + low),  n = k k_k / max(|k k_k|, 1e-12) within each head
//     key = k (1 + (rate - 1) k_a),  a = -n,  b = n rate
//
// Backward, with gn = gb rate - ga and u = k k_k: gu = (gn - n (n . gn)) / |u|, or gn / 1e-12 if |u| is smaller.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/exp.h"
#include "common/shuffles.h"
#include "common/threads.h"
#include "mix/sums.h"

namespace {

constexpr float kLeastNorm = 1e-12f;

// k, low, key, a, b (tokens, channels); a0, k_k, k_a (channels).
template <class E>
struct DeltaKeys {
    const E *k, *low, *a0, *k_k, *k_a;
    int64_t tokens, channels, size;  // size: a head's channels

    // kLanes channels of a head at position p of the tensors and h of the parameters, those past its end zeros.
    Vec stretched(int64_t p, int64_t h, int64_t left) const {
        return load_some(k + p, left) * load_some(k_k + h, left);
    }
    Vec rates(int64_t p, int64_t h, int64_t left) const {
        return sigmoid(load_some(a0 + h, left) + load_some(low + p, left));
    }

    void forward(E* key, E* a, E* b, int threads) const {
        parallel(tokens, tokens * channels, threads, [&](int64_t first, int64_t end, int) {
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < channels; h += size) {
                    const int64_t p = t * channels + h;
                    Vec squares = zero();
                    for (int64_t c = 0; c < size; c += kLanes) {
                        const Vec u = stretched(p + c, h + c, size - c);
                        squares += u * u;
                    }
                    const float scale = 1.0f / std::max(__builtin_sqrtf(total(squares)), kLeastNorm);
                    for (int64_t c = 0; c < size; c += kLanes) {
                        const int64_t left = size - c;
                        const Vec n = stretched(p + c, h + c, left) * scale, rate = rates(p + c, h + c, left);
                        const Vec factor = 1.0f + (rate - 1.0f) * load_some(k_a + h + c, left);
                        store_some(key + p + c, load_some(k + p + c, left) * factor, left);
                        store_some(a + p + c, -n, left);
                        store_some(b + p + c, n * rate, left);
                    }
                }
        });
    }

    // Places for the gradients; those of the parameters are float, and all null or none.
    struct Gradients {
        E *k, *low;
        float *a0, *k_k, *k_a;
    };

    void backward(const E* gkey, const E* ga, const E* gb, const Gradients& to, int threads) const {
        Sums a0_sums(to.a0, channels, threads), k_k_sums(to.k_k, channels, threads),
            k_a_sums(to.k_a, channels, threads);
        parallel(tokens, tokens * channels, threads, [&](int64_t first, int64_t end, int thread) {
            std::vector<float> buffer(size);
            float* gn = buffer.data();
            for (int64_t t = first; t < end; t++)
                for (int64_t h = 0; h < channels; h += size) {
                    const int64_t p = t * channels + h;
                    Vec squares = zero(), products = zero();
                    for (int64_t c = 0; c < size; c += kLanes) {
                        const int64_t left = size - c;
                        const Vec u = stretched(p + c, h + c, left);
                        const Vec g =
                            load_some(gb + p + c, left) * rates(p + c, h + c, left) - load_some(ga + p + c, left);
                        store_some(gn + c, g, left);
                        squares += u * u;
                        products += u * g;
                    }
                    const float length = __builtin_sqrtf(total(squares)), scale = 1.0f / std::max(length, kLeastNorm);
                    const float along = length < kLeastNorm ? 0.0f : total(products) * scale;
                    for (int64_t c = 0; c < size; c += kLanes) {
                        const int64_t left = size - c;
                        const Vec n = stretched(p + c, h + c, left) * scale, rate = rates(p + c, h + c, left);
                        const Vec x = load_some(k + p + c, left), gx = load_some(gkey + p + c, left);
                        const Vec amount = load_some(k_a + h + c, left), below = rate - 1.0f;
                        const Vec gu = (load_some(gn + c, left) - n * along) * scale;
                        const Vec gz = (load_some(gb + p + c, left) * n + gx * x * amount) * (rate * -below);
                        store_some(to.k + p + c, gx * (1.0f + below * amount) + gu * load_some(k_k + h + c, left),
                                   left);
                        store_some(to.low + p + c, gz, left);
                        if (!to.a0) continue;
                        add_some(a0_sums.of(thread, h + c), gz, left);
                        add_some(k_k_sums.of(thread, h + c), gu * x, left);
                        add_some(k_a_sums.of(thread, h + c), gx * x * below, left);
                    }
                }
        });
        a0_sums.add_up();
        k_k_sums.add_up();
        k_a_sums.add_up();
    }
};

}  // namespace
