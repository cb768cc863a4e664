// RWKV-7's value residual: out = v + (first - v) sigmoid(v0 + low), first being the values of layer 0.
#pragma once
#include <cstdint>

#include "common/exp.h"
#include "common/threads.h"
#include "mix/sums.h"

namespace {

// v, first, low, out (tokens, channels); v0 (channels).
template <class E>
struct ValueResidual {
    const E *v, *first, *low, *v0;
    int64_t tokens, channels;

    // The weight of `first` in kLanes channels at position p, and first - v.
    Vec share(int64_t p, int64_t c, int64_t left) const {
        return sigmoid(load_some(v0 + c, left) + load_some(low + p + c, left));
    }
    Vec delta(int64_t p, int64_t left) const { return load_some(first + p, left) - load_some(v + p, left); }

    void forward(E* out, int threads) const {
        parallel(tokens, tokens * channels, threads, [=](int64_t begin, int64_t end, int) {
            for (int64_t p = begin * channels; p < end * channels; p += channels)
                for (int64_t c = 0; c < channels; c += kLanes) {
                    const int64_t left = channels - c;
                    store_some(out + p + c, load_some(v + p + c, left) + delta(p + c, left) * share(p, c, left), left);
                }
        });
    }

    // gv0 is float, and may be null.
    void backward(const E* grad, E* gv, E* gfirst, E* glow, float* gv0, int threads) const {
        Sums sums(gv0, channels, threads);
        parallel(tokens, tokens * channels, threads, [&](int64_t begin, int64_t end, int thread) {
            for (int64_t p = begin * channels; p < end * channels; p += channels)
                for (int64_t c = 0; c < channels; c += kLanes) {
                    const int64_t left = channels - c;
                    const Vec s = share(p, c, left), kept = 1.0f - s, g = load_some(grad + p + c, left);
                    const Vec gz = g * delta(p + c, left) * (s * kept);
                    store_some(gv + p + c, g * kept, left);
                    store_some(gfirst + p + c, g * s, left);
                    store_some(glow + p + c, gz, left);
                    if (gv0) add_some(sums.of(thread, c), gz, left);
                }
        });
        sums.add_up();
    }
};

}  // namespace
