// The models' operations between their matrix products, on CPUs: forward and backward, each in one pass over memory.
//
//     lerp             out_i = x + (previous - x) m_i,  m_i = maa_i (+ low_i up_i)
//     relu_square      out = max(x, 0)^2
//
// Only RWKV-6:
//
//     norm_gate        out = (normalized y * weight + bias) silu(g)
//     sigmoid_gate     out = sigmoid(r) v
//
// Only RWKV-7:
//
//     delta_keys       key = k (1 + (rate - 1) k_a),  a = -n,  b = n rate
//                      rate = sigmoid(a0 + low),  n = k k_k, made of length 1
//     value_residual   out = v + (first - v) sigmoid(v0 + low)
//     norm_bonus_gate  out = (normalized y * weight + bias + s v) g,  s = sum of r k r_k
//
// The row before a sequence's first token is an argument; norms, lengths and s are each head's own.
//
// Tensors are contiguous, of one type, float or bfloat16; sums are taken in float. Rows are tokens. The loops are
// plain, for the compiler to vectorize, or over vectors where that is faster; the library is compiled for one
// instruction set.
#include <cstdint>
#include <vector>

#include "common/dispatch.h"
#include "mix/arguments.h"
#include "mix/delta_keys.h"
#include "mix/gates.h"
#include "mix/lerp.h"
#include "mix/norm_bonus_gate.h"
#include "mix/norm_gate.h"
#include "mix/value_residual.h"

namespace {

// A tensor's elements as floats: themselves, if they are floats, else converted into `copy`.
const float* as_floats(const float* p, int64_t, std::vector<float>&) { return p; }
const float* as_floats(const Bfloat16* p, int64_t count, std::vector<float>& copy) {
    copy.resize(count);
    for (int64_t i = 0; i < count; i++) copy[i] = to_float(p[i]);
    return copy.data();
}

template <class E>
Lerp<E> lerp(const LerpArguments& a, std::vector<float>& floats) {
    return {in<E>(a.x),
            in<E>(a.last),
            in<E>(a.maa),
            in<E>(a.low),
            as_floats(in<E>(a.up), a.n * a.rank * a.channels, floats),
            {a.tokens, a.tokens / a.sequences, a.sequences, a.cu_seqlens},
            a.channels,
            a.rank,
            static_cast<int>(a.n)};
}

template <class E>
NormGate<E> norm_gate(const NormGateArguments& a) {
    return {in<E>(a.y), in<E>(a.g), in<E>(a.weight), in<E>(a.bias), a.tokens, a.channels, a.size, a.eps};
}

template <class E>
DeltaKeys<E> delta_keys(const DeltaKeysArguments& a) {
    return {in<E>(a.k), in<E>(a.low), in<E>(a.a0), in<E>(a.k_k), in<E>(a.k_a), a.tokens, a.channels, a.size};
}

template <class E>
ValueResidual<E> value_residual(const ValueResidualArguments& a) {
    return {in<E>(a.v), in<E>(a.first), in<E>(a.low), in<E>(a.v0), a.tokens, a.channels};
}

template <class E>
NormBonusGate<E> norm_bonus_gate(const NormBonusGateArguments& a) {
    return {in<E>(a.y),      in<E>(a.r),    in<E>(a.k), in<E>(a.v), in<E>(a.g), in<E>(a.r_k),
            in<E>(a.weight), in<E>(a.bias), a.tokens,   a.channels, a.size,     a.eps};
}

}  // namespace

extern "C" {

BY_TYPE(mix_lerp_forward, LerpArguments, std::vector<float> floats;
        lerp<E>(*a, floats).forward(reinterpret_cast<E* const*>(a->outs), a->threads))
BY_TYPE(mix_lerp_backward, LerpArguments, std::vector<float> floats;
        lerp<E>(*a, floats)
            .backward(reinterpret_cast<const E* const*>(a->grads),
                      {out<E>(a->gx), out<E>(a->glast), a->gmaa, out<E>(a->glow), a->gup}, a->threads))
BY_TYPE(mix_norm_gate_forward, NormGateArguments, norm_gate<E>(*a).forward(out<E>(a->out), a->threads))
BY_TYPE(mix_norm_gate_backward, NormGateArguments,
        norm_gate<E>(*a).backward(in<E>(a->grad), out<E>(a->gy), out<E>(a->gg), a->gweight, a->gbias, a->threads))
BY_TYPE(mix_sigmoid_gate_forward, SigmoidGateArguments,
        sigmoid_gate_forward(in<E>(a->r), in<E>(a->v), out<E>(a->out), a->tokens * a->channels, a->threads))
BY_TYPE(mix_sigmoid_gate_backward, SigmoidGateArguments,
        sigmoid_gate_backward(in<E>(a->r), in<E>(a->v), in<E>(a->grad), out<E>(a->gr), out<E>(a->gv),
                              a->tokens * a->channels, a->threads))
BY_TYPE(mix_relu_square_forward, ReluSquareArguments,
        relu_square_forward(in<E>(a->x), out<E>(a->out), a->tokens * a->channels, a->threads))
BY_TYPE(mix_relu_square_backward, ReluSquareArguments,
        relu_square_backward(in<E>(a->out), in<E>(a->grad), out<E>(a->gx), a->tokens * a->channels, a->threads))
BY_TYPE(mix_delta_keys_forward, DeltaKeysArguments,
        delta_keys<E>(*a).forward(out<E>(a->key), out<E>(a->a), out<E>(a->b), a->threads))
BY_TYPE(mix_delta_keys_backward, DeltaKeysArguments,
        delta_keys<E>(*a).backward(in<E>(a->gkey), in<E>(a->ga), in<E>(a->gb),
                                   {out<E>(a->gk), out<E>(a->glow), a->ga0, a->gk_k, a->gk_a}, a->threads))
BY_TYPE(mix_value_residual_forward, ValueResidualArguments, value_residual<E>(*a).forward(out<E>(a->out), a->threads))
BY_TYPE(mix_value_residual_backward, ValueResidualArguments,
        value_residual<E>(*a).backward(in<E>(a->grad), out<E>(a->gv), out<E>(a->gfirst), out<E>(a->glow), a->gv0,
                                       a->threads))
BY_TYPE(mix_norm_bonus_gate_forward, NormBonusGateArguments, norm_bonus_gate<E>(*a).forward(out<E>(a->out), a->threads))
BY_TYPE(mix_norm_bonus_gate_backward, NormBonusGateArguments,
        norm_bonus_gate<E>(*a).backward(in<E>(a->grad),
                                        {out<E>(a->gy), out<E>(a->gr), out<E>(a->gk), out<E>(a->gv), out<E>(a->gg),
                                         a->gr_k, a->gweight, a->gbias},
                                        a->threads))
}
