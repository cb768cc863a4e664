// Neighbours in memory, loaded and stored at once.
#pragma once
#include "common/tile.cuh"

template <class E, int V>
struct alignas(sizeof(E) * V) Vector {
    E x[V];
};

template <class E>
constexpr int WIDEST = 16 / sizeof(E);  // elements in the 16 bytes that a thread moves at most

template <class E, int V>
__device__ __forceinline__ void load_vector(float (&x)[V], const E* p) {
    const Vector<E, V> v = *(const Vector<E, V>*)p;
    #pragma unroll
    for (int e = 0; e < V; e++) x[e] = to_float(v.x[e]);
}
template <class E, int V>
__device__ __forceinline__ void store_vector(E* p, const float (&x)[V]) {
    Vector<E, V> v;
    #pragma unroll
    for (int e = 0; e < V; e++) store(&v.x[e], x[e]);
    *(Vector<E, V>*)p = v;
}
