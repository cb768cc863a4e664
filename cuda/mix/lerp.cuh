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

template <class E>
struct Lerp : Operation<E> {
    using Operation<E>::Operation;

    __device__ index_t last_at(const Place& place) const {
        return (index_t)place.sequence * this->a.channels + this->part.channel;
    }
    __device__ Values previous(index_t t, const Place& place) const {
        if (!place.first) return this->in(0, t - 1);
        return this->a.last ? load<E>(this->a.last, last_at(place), this->part.size) : zero_values();
    }
    // m_i of token t.
    __device__ Values weight(int i, index_t t) const {
        const Values maa =
            load<E>(this->a.parameters[0], (index_t)i * this->a.channels + this->part.channel, this->part.size);
        if (!this->a.inputs[1]) return maa;
        const Values offset =
            load<E>(this->a.inputs[1], i * this->a.tokens * this->a.channels + this->at(t), this->part.size);
        return each([&](int e) { return maa.x[e] + offset.x[e]; });
    }
};

template <class E>
struct LerpForward : Lerp<E> {  // x, offsets (n, tokens, channels); maa (n, channels) -> n points
    static constexpr int SUMS = 0;
    using Lerp<E>::Lerp;
    __device__ void row(index_t t) {
        const Values x = this->in(0, t), before = this->previous(t, place_of(this->a, t));
        #pragma unroll
        for (int i = 0; i < MOST_POINTS; i++) {
            if (i >= this->a.n) break;
            const Values m = this->weight(i, t);
            this->out(i, t, each([&](int e) { return x.x[e] + (before.x[e] - x.x[e]) * m.x[e]; }));
        }
    }
};

template <class E>
struct LerpBackward
    : Lerp<E> {  // x, offsets, n grads; maa -> gx, goffsets (n, tokens, channels), glast; n times gmaa_i
    static constexpr int SUMS = MOST_POINTS;
    Values sums[SUMS] = {zero_values(), zero_values(), zero_values(), zero_values(), zero_values(), zero_values()};
    using Lerp<E>::Lerp;
    __device__ void row(index_t t) {
        const auto& a = this->a;
        const Place place = place_of(a, t);
        Values x = zero_values(), before = zero_values();  // only for the gradients of the weights
        if (a.inputs[0]) x = this->in(0, t), before = this->previous(t, place);
        const bool passes_on = t + 1 < a.tokens && !place_of(a, t + 1).first;
        Values gx = zero_values(), glast = zero_values();
        #pragma unroll
        for (int i = 0; i < MOST_POINTS; i++) {
            if (i >= a.n) break;
            const Values m = this->weight(i, t), grad = this->in(2 + i, t);
            const Values goffset = each([&](int e) { return grad.x[e] * (before.x[e] - x.x[e]); });
            if (a.outputs[1]) save<E>(a.outputs[1], i * a.tokens * a.channels + this->at(t), this->part.size, goffset);
            sums[i] = each([&](int e) { return sums[i].x[e] + goffset.x[e]; });
            gx = each([&](int e) { return gx.x[e] + grad.x[e] * (1.f - m.x[e]); });
            glast = each([&](int e) { return glast.x[e] + grad.x[e] * m.x[e]; });
            if (passes_on) {
                const Values next = this->weight(i, t + 1), later = this->in(2 + i, t + 1);
                gx = each([&](int e) { return gx.x[e] + later.x[e] * next.x[e]; });
            }
        }
        this->out(0, t, gx);
        if (a.glast && place.first) save<E>(a.glast, this->last_at(place), this->part.size, glast);
    }
};
