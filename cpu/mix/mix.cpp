// What RWKV-6 computes between its matrix products, on CPUs: forward and backward, each in one pass over memory.
//
//     lerp          out_i = x + (previous - x) m_i,  m_i = maa_i (+ low_i up_i)     previous: the token before, or
//     `last` norm_gate     out = (normalized y * weight + bias) silu(g)                    normalized within each head
//     sigmoid_gate  out = sigmoid(r) v
//     relu_square   out = max(x, 0)^2
//
// Tensors are contiguous, of one type, float or bfloat16; sums are taken in float. Rows are tokens. The loops are
// plain, for the compiler to vectorize; the library is compiled for one instruction set.
#include <cstdint>
#include <vector>

#include "common/dispatch.h"
#include "mix/arguments.h"
#include "mix/gates.h"
#include "mix/lerp.h"
#include "mix/norm_gate.h"

namespace {

// A tensor's elements as floats: where they lie, if they are floats already, else converted into `copy`.
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
    return {in<E>(a.y), in<E>(a.g), in<E>(a.weight), in<E>(a.bias), a.tokens, a.heads, a.size, a.eps};
}

}  // namespace

extern "C" {

void mix_lerp_forward(const LerpArguments* a) {
    std::vector<float> floats;
    by_type(a->bfloat16, [&](auto element) {
        using E = decltype(element);
        lerp<E>(*a, floats).forward(reinterpret_cast<E* const*>(a->outs), a->threads);
    });
}

void mix_lerp_backward(const LerpArguments* a) {
    std::vector<float> floats;
    by_type(a->bfloat16, [&](auto element) {
        using E = decltype(element);
        lerp<E>(*a, floats)
            .backward(reinterpret_cast<const E* const*>(a->grads),
                      {out<E>(a->gx), out<E>(a->glast), a->gmaa, out<E>(a->glow), a->gup}, a->threads);
    });
}

void mix_norm_gate_forward(const NormGateArguments* a) {
    by_type(a->bfloat16, [=](auto element) {
        using E = decltype(element);
        norm_gate<E>(*a).forward(out<E>(a->out), a->threads);
    });
}

void mix_norm_gate_backward(const NormGateArguments* a) {
    by_type(a->bfloat16, [=](auto element) {
        using E = decltype(element);
        norm_gate<E>(*a).backward(in<E>(a->grad), out<E>(a->gy), out<E>(a->gg), a->gweight, a->gbias, a->threads);
    });
}

void mix_sigmoid_gate_forward(const SigmoidGateArguments* a) {
    by_type(a->bfloat16, [=](auto element) {
        using E = decltype(element);
        sigmoid_gate_forward(in<E>(a->r), in<E>(a->v), out<E>(a->out), a->count, a->threads);
    });
}

void mix_sigmoid_gate_backward(const SigmoidGateArguments* a) {
    by_type(a->bfloat16, [=](auto element) {
        using E = decltype(element);
        sigmoid_gate_backward(in<E>(a->r), in<E>(a->v), in<E>(a->grad), out<E>(a->gr), out<E>(a->gv), a->count,
                              a->threads);
    });
}

void mix_relu_square_forward(const ReluSquareArguments* a) {
    by_type(a->bfloat16, [=](auto element) {
        using E = decltype(element);
        relu_square_forward(in<E>(a->x), out<E>(a->out), a->count, a->threads);
    });
}

void mix_relu_square_backward(const ReluSquareArguments* a) {
    by_type(a->bfloat16, [=](auto element) {
        using E = decltype(element);
        relu_square_backward(in<E>(a->x), in<E>(a->grad), out<E>(a->gx), a->count, a->threads);
    });
}
}
