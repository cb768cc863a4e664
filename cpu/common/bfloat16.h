// bfloat16 in memory, float in computation: a bfloat16 is the upper half of a float. Rounding is to nearest even, and a
// NaN stays one.
#pragma once
#include <cstdint>
#include <cstring>

namespace {  // each library has its own copies, compiled for its instruction set

struct Bfloat16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

template <class E>
inline E from_float(float x);
template <>
inline float from_float<float>(float x) {
    return x;
}
template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40;
    return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded)};
}

}  // namespace
