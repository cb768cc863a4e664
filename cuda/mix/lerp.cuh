// Token shift with interpolation: out_i = x + (previous - x) m_i, m_i = maa_i + offset_i. `previous` is the token
// before; the offsets, one for each token and channel, are null if the weights do not depend on the token.
// cpu/mix/lerp.h has the formulas; here the offsets are the result of a matrix product outside (low_rank.cuh has it
// inside).
#pragma once
#include "mix/rows.cuh"

constexpr int MOST_POINTS = 6;

// The sequence of a token, and true if the token is its first.
struct Place {
    int sequence;
    bool first;
};
__device__ __forceinline__ Place place_of(const MixArguments& a, index_t t) {
    if (!a.bounds) return Place{(int)(t / a.length), t % a.length == 0};
    int low = 0, high = a.sequences;  // bounds[low] <= t < bounds[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (a.bounds[middle] <= t)
            low = middle;
        else
            high = middle;
    }
    return Place{low, a.bounds[low] == t};
}

struct Lerp : Operation {
    using Operation::Operation;

    __device__ index_t last_at(const Place& place) const { return (index_t)place.sequence * a.channels + part.channel; }
    __device__ Values previous(index_t t, const Place& place) const {
        if (!place.first) return in(0, t - 1);
        return a.last ? load(a.last, last_at(place), part.size) : zero_values();
    }
    // m_i of token t.
    __device__ Values weight(int i, index_t t) const {
        const Values maa = load(a.parameters[0], (index_t)i * a.channels + part.channel, part.size);
        if (!a.inputs[1]) return maa;
        const Values offset = load(a.inputs[1], i * a.tokens * a.channels + at(t), part.size);
        return each([&](int e) { return maa.x[e] + offset.x[e]; });
    }
};

struct LerpForward : Lerp {  // x, offsets (n, tokens, channels); maa (n, channels) -> n points
    static constexpr int SUMS = 0;
    using Lerp::Lerp;
    __device__ void row(index_t t) {
        const Values x = in(0, t), before = previous(t, place_of(a, t));
        #pragma unroll
        for (int i = 0; i < MOST_POINTS; i++) {
            if (i >= a.n) break;
            const Values m = weight(i, t);
            out(i, t, each([&](int e) { return x.x[e] + (before.x[e] - x.x[e]) * m.x[e]; }));
        }
    }
};

struct LerpBackward : Lerp {  // x, offsets, n grads; maa -> gx, goffsets (n, tokens, channels), glast; n times gmaa_i
    static constexpr int SUMS = MOST_POINTS;
    Values sums[SUMS] = {zero_values(), zero_values(), zero_values(), zero_values(), zero_values(), zero_values()};
    using Lerp::Lerp;
    __device__ void row(index_t t) {
        const Place place = place_of(a, t);
        Values x = zero_values(), before = zero_values();  // only for the gradients of the weights
        if (a.inputs[0]) x = in(0, t), before = previous(t, place);
        const bool passes_on = t + 1 < a.tokens && !place_of(a, t + 1).first;
        Values gx = zero_values(), glast = zero_values();
        #pragma unroll
        for (int i = 0; i < MOST_POINTS; i++) {
            if (i >= a.n) break;
            const Values m = weight(i, t), grad = in(2 + i, t);
            const Values goffset = each([&](int e) { return grad.x[e] * (before.x[e] - x.x[e]); });
            if (a.outputs[1]) save(a.outputs[1], i * a.tokens * a.channels + at(t), part.size, goffset);
            sums[i] = each([&](int e) { return sums[i].x[e] + goffset.x[e]; });
            gx = each([&](int e) { return gx.x[e] + grad.x[e] * (1.f - m.x[e]); });
            glast = each([&](int e) { return glast.x[e] + grad.x[e] * m.x[e]; });
            if (passes_on) {
                const Values next = weight(i, t + 1), later = in(2 + i, t + 1);
                gx = each([&](int e) { return gx.x[e] + later.x[e] * next.x[e]; });
            }
        }
        out(0, t, gx);
        if (a.glast && place.first) save(a.glast, last_at(place), part.size, glast);
    }
};
