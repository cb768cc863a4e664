// Products of a few rows with a large matrix on CPUs, as a step of decoding takes them: the time is that of reading the
// matrix, which passes once, in full precision (dense.h) or in blocks of 8 or 4 bits (blocks.h).
//
// Everything is contiguous; x and y are of one type, float or bfloat16, and sums are float.
#include "common/dispatch.h"
#include "decode/arguments.h"
#include "decode/blocks.h"
#include "decode/dense.h"
#include "decode/elements.h"

namespace {

template <class E>
void product(const ProductArguments* a) {
    const int32_t* w = in<int32_t>(a->w);
    if (a->bits == 8)
        blocks<E, 8>(in<E>(a->x), w, out<E>(a->y), a->rows, a->in_features, a->out_features, a->threads);
    else if (a->bits == 4)
        blocks<E, 4>(in<E>(a->x), w, out<E>(a->y), a->rows, a->in_features, a->out_features, a->threads);
    else
        dense<E>(in<E>(a->x), in<E>(a->w), out<E>(a->y), a->rows, a->in_features, a->out_features, a->threads);
}

}  // namespace

extern "C" {

BY_TYPE(decode_product, ProductArguments, product<E>(a))
BY_TYPE(decode_norm, NormArguments,
        norm_rows<E>(*a, out<E>(a->x), in<E>(a->add), in<E>(a->weight), in<E>(a->bias), out<E>(a->y)))
BY_TYPE(decode_elements, ElementArguments, elements<E>(*a, out<E>(a->x), in<E>(a->bias)))

// Makes calls one after the other: a step of decoding, whose calls take Python longer than the processor. Returns 0, or
// the result of the first checked call that fails.
int decode_run(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (!calls[i].checked) {
            reinterpret_cast<void (*)(const void*)>(calls[i].function)(calls[i].arguments);
        } else if (const int failed = reinterpret_cast<int (*)(const void*)>(calls[i].function)(calls[i].arguments)) {
            return failed;
        }
    }
    return 0;
}
}
