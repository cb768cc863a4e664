// Neighbours in memory, loaded and stored at once.
#pragma once
#include "common/tile.cuh"

template <int V>
struct alignas(sizeof(bf16) * V) Vector {
    bf16 x[V];
};

constexpr int WIDEST = 16 / sizeof(bf16);  // elements in the 16 bytes that a thread moves at most

template <int V>
__device__ __forceinline__ void load_vector(float (&x)[V], const bf16* p) {
    const Vector<V> v = *(const Vector<V>*)p;
    #pragma unroll
    for (int e = 0; e < V; e++) x[e] = to_float(v.x[e]);
}
template <int V>
__device__ __forceinline__ void store_vector(bf16* p, const float (&x)[V]) {
    Vector<V> v;
    #pragma unroll
    for (int e = 0; e < V; e++) store(&v.x[e], x[e]);
    *(Vector<V>*)p = v;
}
