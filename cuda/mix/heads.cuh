// Operations within heads, each a group: norms with their gates, and RWKV-7's keys. cpu/mix has the formulas.
#pragma once
#include "mix/rows.cuh"

struct NormGateForward : Operation {  // y, g; weight, bias -> (normalized y weight + bias) silu(g)
    static constexpr int SUMS = 0;
    const Values weight, bias;
    __device__ NormGateForward(const MixArguments& a, const Part& part)
        : Operation(a, part), weight(parameter(0)), bias(parameter(1)) {}
    __device__ void row(index_t t) {
        const Normal n = normalize(in(0, t), part.size, a.eps);
        const Values g = in(1, t);
        out(0, t, each([&](int e) { return (n.z.x[e] * weight.x[e] + bias.x[e]) * g.x[e] * sigmoid(g.x[e]); }));
    }
};

struct NormGateBackward : Operation {  // y, g, grad; weight, bias -> gy, gg; gweight, gbias
    static constexpr int SUMS = 2;
    const Values weight, bias;
    Values sums[SUMS] = {zero_values(), zero_values()};
    __device__ NormGateBackward(const MixArguments& a, const Part& part)
        : Operation(a, part), weight(parameter(0)), bias(parameter(1)) {}
    __device__ void row(index_t t) {
        const Normal n = normalize(in(0, t), part.size, a.eps);
        const Values g = in(1, t), grad = in(2, t);
        const Values gate = each([&](int e) { return sigmoid(g.x[e]); });
        const Values d = each([&](int e) { return grad.x[e] * g.x[e] * gate.x[e]; });  // of the norm's result
        out(1, t, each([&](int e) {
            const float whole = n.z.x[e] * weight.x[e] + bias.x[e];
            return grad.x[e] * whole * gate.x[e] * (1.f + g.x[e] * (1.f - gate.x[e]));
        }));
        sums[0] = each([&](int e) { return sums[0].x[e] + d.x[e] * n.z.x[e]; });
        sums[1] = each([&](int e) { return sums[1].x[e] + d.x[e]; });
        const Values dz = each([&](int e) { return d.x[e] * weight.x[e]; });
        out(0, t, normalize_backward(n, dz, part.size));
    }
};

constexpr float LEAST_NORM = 1e-12f;

// The common start of both directions of RWKV-7's keys.
struct DeltaKeys : Operation {
    const Values a0, k_k, k_a;
    __device__ DeltaKeys(const MixArguments& a, const Part& part)
        : Operation(a, part), a0(parameter(0)), k_k(parameter(1)), k_a(parameter(2)) {}
    __device__ Values stretched(const Values& k) const {
        return each([&](int e) { return k.x[e] * k_k.x[e]; });
    }
    __device__ Values rates(const Values& low) const {
        return each([&](int e) { return sigmoid(a0.x[e] + low.x[e]); });
    }
    static __device__ float length(const Values& u) {
        return sqrtf(total(each([&](int e) { return u.x[e] * u.x[e]; })));
    }
};

struct DeltaKeysForward : DeltaKeys {  // k, low; a0, k_k, k_a -> key, a, b
    static constexpr int SUMS = 0;
    using DeltaKeys::DeltaKeys;
    __device__ void row(index_t t) {
        const Values k = in(0, t), rate = rates(in(1, t)), u = stretched(k);
        const float scale = 1.f / max(length(u), LEAST_NORM);
        out(0, t, each([&](int e) { return k.x[e] * (1.f + (rate.x[e] - 1.f) * k_a.x[e]); }));
        out(1, t, each([&](int e) { return -u.x[e] * scale; }));
        out(2, t, each([&](int e) { return u.x[e] * scale * rate.x[e]; }));
    }
};

struct DeltaKeysBackward : DeltaKeys {  // k, low, gkey, ga, gb; a0, k_k, k_a -> gk, glow; ga0, gk_k, gk_a
    static constexpr int SUMS = 3;
    Values sums[SUMS] = {zero_values(), zero_values(), zero_values()};
    using DeltaKeys::DeltaKeys;
    __device__ void row(index_t t) {
        const Values k = in(0, t), rate = rates(in(1, t)), u = stretched(k);
        const Values gkey = in(2, t), ga = in(3, t), gb = in(4, t);
        const float norm = length(u), scale = 1.f / max(norm, LEAST_NORM);
        const Values gn = each([&](int e) { return gb.x[e] * rate.x[e] - ga.x[e]; });
        const float dot = total(each([&](int e) { return u.x[e] * gn.x[e]; }));
        const float along = norm < LEAST_NORM ? 0.f : dot * scale;
        const Values gu = each([&](int e) { return (gn.x[e] - u.x[e] * scale * along) * scale; });
        const Values gz = each([&](int e) {  // of a0 + low
            const float grate = gb.x[e] * u.x[e] * scale + gkey.x[e] * k.x[e] * k_a.x[e];
            return grate * rate.x[e] * (1.f - rate.x[e]);
        });
        out(0, t, each([&](int e) { return gkey.x[e] * (1.f + (rate.x[e] - 1.f) * k_a.x[e]) + gu.x[e] * k_k.x[e]; }));
        out(1, t, gz);
        sums[0] = each([&](int e) { return sums[0].x[e] + gz.x[e]; });
        sums[1] = each([&](int e) { return sums[1].x[e] + gu.x[e] * k.x[e]; });
        sums[2] = each([&](int e) { return sums[2].x[e] + gkey.x[e] * k.x[e] * (rate.x[e] - 1.f); });
    }
};

// The common start of both directions of RWKV-7's norm with a bonus.
struct NormBonusGate : Operation {
    const Values r_k, weight, bias;
    __device__ NormBonusGate(const MixArguments& a, const Part& part)
        : Operation(a, part), r_k(parameter(0)), weight(parameter(1)), bias(parameter(2)) {}
    __device__ float bonus(const Values& r, const Values& k) const {
        return total(each([&](int e) { return r.x[e] * k.x[e] * r_k.x[e]; }));
    }
    __device__ Values whole(const Normal& n, float bonus, const Values& v) const {
        return each([&](int e) { return n.z.x[e] * weight.x[e] + bias.x[e] + bonus * v.x[e]; });
    }
};

struct NormBonusGateForward : NormBonusGate {  // y, r, k, v, g; r_k, weight, bias -> (… + s v) g
    static constexpr int SUMS = 0;
    using NormBonusGate::NormBonusGate;
    __device__ void row(index_t t) {
        const Normal n = normalize(in(0, t), part.size, a.eps);
        const Values g = in(4, t), v = in(3, t);
        const float s = bonus(in(1, t), in(2, t));
        const Values x = whole(n, s, v);
        out(0, t, each([&](int e) { return x.x[e] * g.x[e]; }));
    }
};

struct NormBonusGateBackward : NormBonusGate {  // y, r, k, v, g, grad; … -> gy, gr, gk, gv, gg; gr_k, gweight, gbias
    static constexpr int SUMS = 3;
    Values sums[SUMS] = {zero_values(), zero_values(), zero_values()};
    using NormBonusGate::NormBonusGate;
    __device__ void row(index_t t) {
        const Normal n = normalize(in(0, t), part.size, a.eps);
        const Values r = in(1, t), k = in(2, t), v = in(3, t), g = in(4, t);
        const Values grad = in(5, t);
        const float s = bonus(r, k);
        const Values x = whole(n, s, v);
        const Values d = each([&](int e) { return grad.x[e] * g.x[e]; });  // of what is gated
        const Values dz = each([&](int e) { return d.x[e] * weight.x[e]; });
        out(0, t, normalize_backward(n, dz, part.size));
        const float gs = total(each([&](int e) { return d.x[e] * v.x[e]; }));
        out(1, t, each([&](int e) { return gs * k.x[e] * r_k.x[e]; }));
        out(2, t, each([&](int e) { return gs * r.x[e] * r_k.x[e]; }));
        out(3, t, each([&](int e) { return d.x[e] * s; }));
        out(4, t, each([&](int e) { return grad.x[e] * x.x[e]; }));
        sums[0] = each([&](int e) { return sums[0].x[e] + gs * r.x[e] * k.x[e]; });
        sums[1] = each([&](int e) { return sums[1].x[e] + d.x[e] * n.z.x[e]; });
        sums[2] = each([&](int e) { return sums[2].x[e] + d.x[e]; });
    }
};
