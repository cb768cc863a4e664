// What follows the recurrence in RWKV-6's block, for the kernels that make it where they have its rows: each head's
// norm, and a gate. For one token of a head,
//     out = (z weight + bias) silu(g),    z = (y - mean) scale,    scale = 1 / sqrt(variance + eps)
// A thread has eight neighbours of one token, those that it copies (own()), and N / 8 threads of a warp have a row.
#pragma once
#include "common/vector.cuh"
#include "wkv6/chunk.cuh"

// The gate's share of a block's shared memory: of one chunk y and g, and the head's parameters.
template <int N, bool GATED>
struct GateShared {};
template <int N>
struct alignas(32) GateShared<N, true> {  // as load_vector reads eight floats
    typename Shape<N>::Rows y, g;
    float weight[N], bias[N];
};

template <int N>
__device__ __forceinline__ void load_parameters(GateShared<N, true>& gate, const Arguments& a, const Sequence& s) {
    const int c = threadIdx.x;
    if (c >= N) return;
    gate.weight[c] = to_float(((const bf16*)a.weight)[s.channel(a) + c]);
    gate.bias[c] = to_float(((const bf16*)a.bias)[s.channel(a) + c]);
}

// What a thread has of the chunk.
struct GateRows { Tile y, g; };
template <int N>
__device__ __forceinline__ GateRows own_rows(GateShared<N, true>& gate) {
    return {load_eight(own<N>(gate.y)), load_eight(own<N>(gate.g))};
}
template <int N>
__device__ __forceinline__ GateRows own_rows(GateShared<N, false>&) {
    return {};
}

// The thread's eight of a parameter.
template <int N>
__device__ __forceinline__ Accumulator own_parameter(const float (&parameter)[N]) {
    Accumulator x;
    load_vector(x.c, &parameter[threadIdx.x % (N / 8) * 8]);
    return x;
}

__device__ __forceinline__ float sum_of(const Accumulator& x) {
    float sum = x.c[0];
    #pragma unroll
    for (int e = 1; e < 8; e++) sum += x.c[e];
    return sum;
}
__device__ __forceinline__ float dot_of(const Accumulator& x, const Accumulator& y) {
    float sum = x.c[0] * y.c[0];
    #pragma unroll
    for (int e = 1; e < 8; e++) sum += x.c[e] * y.c[e];
    return sum;
}

// A row of y, normalized: z = d scale + shift. d is y less the row's first element, so that its variance can be taken
// of the sums of d and d squared, at once, without cancellation.
struct Normal {
    Accumulator d;
    float scale, shift;

    __device__ __forceinline__ float z(int e) const { return d.c[e] * scale + shift; }
};
template <int N>
__device__ __forceinline__ Normal normalized(const Tile& y, float eps) {
    Normal n;
    n.d = widened(y);
    const float first = __shfl_sync(~0u, n.d.c[0], lane_id() / (N / 8) * (N / 8));
    #pragma unroll
    for (int e = 0; e < 8; e++) n.d.c[e] -= first;
    const float mean = row_sum<N>(sum_of(n.d)) / N, square = row_sum<N>(dot_of(n.d, n.d)) / N;
    n.scale = reciprocal_root_approx(max(square - mean * mean, 0.f) + eps);
    n.shift = -mean * n.scale;
    return n;
}

__device__ __forceinline__ float sigmoid_approx(float x) { return reciprocal_approx(1.f + exp2_approx(-x * LOG2_E)); }

template <int N>
__device__ __forceinline__ Tile gated(const GateRows& rows, const GateShared<N, true>& gate, float eps) {
    const Normal n = normalized<N>(rows.y, eps);
    const Accumulator weight = own_parameter(gate.weight), bias = own_parameter(gate.bias), x = widened(rows.g);
    Accumulator out;
    #pragma unroll
    for (int e = 0; e < 8; e++) out.c[e] = (n.z(e) * weight.c[e] + bias.c[e]) * x.c[e] * sigmoid_approx(x.c[e]);
    return rounded(out);
}

// The gradients of y and g, from that of out.
struct GateGradients { Tile gy, gg; };
template <int N>
__device__ __forceinline__ GateGradients gate_gradients(const GateRows& rows, const Tile& gout,
                                                        const GateShared<N, true>& gate, float eps) {
    const Normal n = normalized<N>(rows.y, eps);
    const Accumulator weight = own_parameter(gate.weight), bias = own_parameter(gate.bias);
    const Accumulator x = widened(rows.g), grad = widened(gout);
    Accumulator gz, gsilu;  // of z; and grad silu'(g)
    #pragma unroll
    for (int e = 0; e < 8; e++) {
        const float open = sigmoid_approx(x.c[e]), silu = x.c[e] * open;
        gz.c[e] = grad.c[e] * silu * weight.c[e];
        gsilu.c[e] = grad.c[e] * (open + silu * (1.f - open));
    }
    // gy = scale (gz - mean of gz - z times the mean of gz z): a sum of gz, d and 1, whose factors need sums of neither
    // y's nor gz's norm, so that no sum waits for another.
    const float gz_mean = row_sum<N>(sum_of(gz)) / N, gz_d = row_sum<N>(dot_of(gz, n.d)) / N;
    const float along = -n.scale * (gz_d * n.scale + gz_mean * n.shift);
    const float of_d = along * n.scale, of_one = along * n.shift - gz_mean * n.scale;
    Accumulator gy, gg;
    #pragma unroll
    for (int e = 0; e < 8; e++) {
        gy.c[e] = gz.c[e] * n.scale + (n.d.c[e] * of_d + of_one);
        gg.c[e] = gsilu.c[e] * (n.z(e) * weight.c[e] + bias.c[e]);
    }
    return {rounded(gy), rounded(gg)};
}
