// From the untyped pointers of an arguments structure to tensors' elements.
#pragma once
#include "common/bfloat16.h"

namespace {

// call(E{}) of a generic lambda, E being the type of the elements.
template <class Call>
auto by_type(int bfloat16, const Call& call) {
    return bfloat16 ? call(Bfloat16{}) : call(float{});
}

template <class E>
const E* in(const void* p) {
    return static_cast<const E*>(p);
}
template <class E>
E* out(void* p) {
    return static_cast<E*>(p);
}

}  // namespace

// Defines the C function name(const Arguments* a), which runs the rest with E, the type of the tensors.
#define BY_TYPE(name, Arguments, ...)            \
    void name(const Arguments* a) {              \
        by_type(a->bfloat16, [=](auto element) { \
            using E = decltype(element);         \
            __VA_ARGS__;                         \
        });                                      \
    }
