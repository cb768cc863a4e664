// Elementwise operations: max(x, 0)^2, sigmoid(r) v, RWKV-7's value residual, and tanh of sums whose parts come from
// low_rank.cuh.
#pragma once
#include "mix/rows.cuh"

struct ReluSquareForward : Operation {  // x -> max(x, 0)^2
    static constexpr int SUMS = 0;
    using Operation::Operation;
    __device__ void row(index_t t) {
        const Values x = in(0, t);
        out(0, t, each([&](int e) {
            const float positive = x.x[e] < 0.f ? 0.f : x.x[e];  // NaN stays
            return positive * positive;
        }));
    }
};

struct ReluSquareBackward : Operation {  // out, grad -> gx: 2 max(x, 0) = 2 sqrt(out)
    static constexpr int SUMS = 0;
    using Operation::Operation;
    __device__ void row(index_t t) {
        const Values result = in(0, t), grad = in(1, t);
        out(0, t, each([&](int e) { return 2.f * sqrtf(result.x[e]) * grad.x[e]; }));
    }
};

struct SigmoidGateForward : Operation {  // r, v -> sigmoid(r) v
    static constexpr int SUMS = 0;
    using Operation::Operation;
    __device__ void row(index_t t) {
        const Values r = in(0, t), v = in(1, t);
        out(0, t, each([&](int e) { return sigmoid(r.x[e]) * v.x[e]; }));
    }
};

struct SigmoidGateBackward : Operation {  // r, v, grad -> gr, gv
    static constexpr int SUMS = 0;
    using Operation::Operation;
    __device__ void row(index_t t) {
        const Values r = in(0, t), v = in(1, t), grad = in(2, t);
        const Values gate = each([&](int e) { return sigmoid(r.x[e]); });
        out(0, t, each([&](int e) { return grad.x[e] * v.x[e] * gate.x[e] * (1.f - gate.x[e]); }));
        out(1, t, each([&](int e) { return grad.x[e] * gate.x[e]; }));
    }
};

struct ValueResidualForward : Operation {  // v, first, low; v0 -> v + (first - v) sigmoid(v0 + low)
    static constexpr int SUMS = 0;
    const Values v0;
    __device__ ValueResidualForward(const MixArguments& a, const Part& part) : Operation(a, part), v0(parameter(0)) {}
    __device__ void row(index_t t) {
        const Values v = in(0, t), first = in(1, t), low = in(2, t);
        out(0, t, each([&](int e) { return v.x[e] + (first.x[e] - v.x[e]) * sigmoid(v0.x[e] + low.x[e]); }));
    }
};

struct ValueResidualBackward : Operation {  // v, first, low, grad; v0 -> gv, gfirst, glow; gv0
    static constexpr int SUMS = 1;
    const Values v0;
    Values sums[SUMS] = {zero_values()};
    __device__ ValueResidualBackward(const MixArguments& a, const Part& part) : Operation(a, part), v0(parameter(0)) {}
    __device__ void row(index_t t) {
        const Values v = in(0, t), first = in(1, t), low = in(2, t);
        const Values grad = in(3, t);
        const Values share = each([&](int e) { return sigmoid(v0.x[e] + low.x[e]); });
        const Values glow =
            each([&](int e) { return grad.x[e] * (first.x[e] - v.x[e]) * share.x[e] * (1.f - share.x[e]); });
        out(0, t, each([&](int e) { return grad.x[e] * (1.f - share.x[e]); }));
        out(1, t, each([&](int e) { return grad.x[e] * share.x[e]; }));
        out(2, t, glow);
        sums[0] = each([&](int e) { return sums[0].x[e] + glow.x[e]; });
    }
};
