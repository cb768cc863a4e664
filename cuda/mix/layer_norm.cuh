// Layer norm, out = (x - mean) scale weight + bias, over all channels of a token, which a block has; and the gradient,
// to which that of x's second user, the residual, is added. Mean and scale, 1 / standard deviation, are kept for
// backward.
#pragma once
#include "common/vector.cuh"
#include "mix/left.cuh"
#include "mix/rows.cuh"

constexpr int NORM_THREADS = 256;
constexpr int MOST_CHANNELS = 8192;

// The sum of x over a block's threads.
__device__ __forceinline__ float block_total(float x) {
    __shared__ float shared[NORM_THREADS / 32];
    #pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    if (lane_id() == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.f;
    #pragma unroll
    for (int warp = 0; warp < NORM_THREADS / 32; warp++) sum += shared[warp];
    __syncthreads();  // read before the next call writes
    return sum;
}

// f(c) for each V neighbours c, c + 1, … that a thread has of the channels.
template <int V, class F>
__device__ __forceinline__ void each_own(const MixArguments& a, F f) {
    for (int c = threadIdx.x * V; c < a.channels; c += NORM_THREADS * V) f(c);
}

// x as an E has it.
template <class E>
__device__ __forceinline__ float rounded(float x) {
    E e;
    store(&e, x);
    return to_float(e);
}

struct RowStats { float mean, scale; };  // scale: 1 / standard deviation

__device__ __forceinline__ RowStats stats_of(const MixArguments& a, index_t t) {
    return RowStats{((const float*)a.inputs[3])[2 * t], ((const float*)a.inputs[3])[2 * t + 1]};
}

// row = token t of x + sigmoid(gate) y, or of x where y and gate are null, each with what was left of it. Where it is
// the block's own, its stats are written, and it where outputs[2] is given: then it is as backward will read it.
template <class E, int V>
__device__ RowStats sum_row(const MixArguments& a, index_t t, float* row, bool own) {
    const index_t at = t * a.channels;
    float sum = 0.f;
    each_own<V>(a, [&](int c) {
        float x[V];
        load_vector<E, V>(x, (const E*)a.inputs[0] + at + c);
        add_left<E, V>(a, a.inputs[3], t, c, x);
        if (a.inputs[1]) {
            float y[V], gate[V];
            load_vector<E, V>(y, (const E*)a.inputs[1] + at + c);
            load_vector<E, V>(gate, (const E*)a.inputs[2] + at + c);
            add_left<E, V>(a, a.inputs[4], t, c, y);
            add_left<E, V>(a, a.inputs[5], t, c, gate);
            #pragma unroll
            for (int e = 0; e < V; e++) x[e] += y[e] * sigmoid(gate[e]);
        }
        if (a.outputs[2]) {
            #pragma unroll
            for (int e = 0; e < V; e++) x[e] = rounded<E>(x[e]);
            if (own) store_vector<E, V>((E*)a.outputs[2] + at + c, x);
        }
        #pragma unroll
        for (int e = 0; e < V; e++) row[c + e] = x[e], sum += x[e];
    });
    const float mean = block_total(sum) / a.channels;
    float squares = 0.f;
    each_own<V>(a, [&](int c) {
        #pragma unroll
        for (int e = 0; e < V; e++) squares += (row[c + e] - mean) * (row[c + e] - mean);
    });
    const float scale = 1.f / sqrtf(block_total(squares) / a.channels + a.eps);
    if (own && threadIdx.x == 0) ((float*)a.outputs[0])[2 * t] = mean, ((float*)a.outputs[0])[2 * t + 1] = scale;
    return RowStats{mean, scale};
}
template <class E, int V>
__device__ __forceinline__ void normalize_row(const MixArguments& a, const RowStats& stats, const float* row, int c,
                                              float (&out)[V]) {
    float weight[V];
    load_vector<E, V>(weight, (const E*)a.parameters[0] + c);
    load_vector<E, V>(out, (const E*)a.parameters[1] + c);
    #pragma unroll
    for (int e = 0; e < V; e++) out[e] += (row[c + e] - stats.mean) * stats.scale * weight[e];
}

// row = the gradient of the normalized values, from that of the norm's result; sum and along add up, for this thread,
// it and its product with those values.
template <class E, int V>
__device__ __forceinline__ void gather_row(const MixArguments& a, const RowStats& stats, index_t t, int c,
                                           const float (&grad)[V], float* row, float& sum, float& along) {
    float x[V], weight[V];
    load_vector<E, V>(x, (const E*)a.inputs[0] + t * a.channels + c);
    load_vector<E, V>(weight, (const E*)a.parameters[0] + c);
    #pragma unroll
    for (int e = 0; e < V; e++) {
        row[c + e] = grad[e] * weight[e];
        sum += row[c + e];
        along += row[c + e] * (x[e] - stats.mean) * stats.scale;
    }
}
// The gradient of the sum, from the row and the threads' sums, and from what else it gets; f(c, it) for each V
// channels c, c + 1, … that a thread has.
template <class E, int V, class F>
__device__ __forceinline__ void store_row_gradient(const MixArguments& a, const RowStats& stats, index_t t,
                                                   const float* row, float sum, float along, F f) {
    const index_t at = t * a.channels;
    sum = block_total(sum) / a.channels;
    along = block_total(along) / a.channels;
    each_own<V>(a, [&](int c) {
        float x[V], gx[V];
        load_vector<E, V>(x, (const E*)a.inputs[0] + at + c);
        load_vector<E, V>(gx, (const E*)a.inputs[2] + at + c);
        #pragma unroll
        for (int e = 0; e < V; e++)
            gx[e] += stats.scale * (row[c + e] - sum - (x[e] - stats.mean) * stats.scale * along);
        store_vector<E, V>((E*)a.outputs[0] + at + c, gx);
        f(c, gx);
    });
}

// x; weight, bias -> stats, out
template <class E, int V>
__device__ void layer_norm_forward_by(const MixArguments& a) {
    float* row = (float*)dynamic_shared();
    const RowStats stats = sum_row<E, V>(a, blockIdx.x, row, true);
    each_own<V>(a, [&](int c) {
        float out[V];
        normalize_row<E, V>(a, stats, row, c, out);
        store_vector<E, V>((E*)a.outputs[1] + (index_t)blockIdx.x * a.channels + c, out);
    });
}

// x, grad of out, grad of x from its second user, stats; weight -> the gradient of x
template <class E, int V>
__device__ void layer_norm_backward_by(const MixArguments& a) {
    float* row = (float*)dynamic_shared();
    const index_t t = blockIdx.x;
    const RowStats stats = stats_of(a, t);
    float sum = 0.f, along = 0.f;
    each_own<V>(a, [&](int c) {
        float grad[V];
        load_vector<E, V>(grad, (const E*)a.inputs[1] + t * a.channels + c);
        gather_row<E, V>(a, stats, t, c, grad, row, sum, along);
    });
    store_row_gradient<E, V>(a, stats, t, row, sum, along, [](int, const float (&)[V]) {});
}

// a.size: how many neighbours are read at once, the widest that there is, or two.
template <class E>
__device__ void layer_norm_forward(const MixArguments& a) {
    if (a.size == WIDEST<E>)
        layer_norm_forward_by<E, WIDEST<E>>(a);
    else
        layer_norm_forward_by<E, 2>(a);
}
template <class E>
__device__ void layer_norm_backward(const MixArguments& a) {
    if (a.size == WIDEST<E>)
        layer_norm_backward_by<E, WIDEST<E>>(a);
    else
        layer_norm_backward_by<E, 2>(a);
}

template <class E>
struct LayerNormSums : Operation<E> {  // x, grad of out, stats -> gweight, gbias
    static constexpr int SUMS = 2;
    Values sums[SUMS] = {zero_values(), zero_values()};
    using Operation<E>::Operation;
    __device__ void row(index_t t) {
        const float mean = ((const float*)this->a.inputs[2])[2 * t],
                    scale = ((const float*)this->a.inputs[2])[2 * t + 1];
        const Values x = this->in(0, t), grad = this->in(1, t);
        sums[0] = each([&](int e) { return sums[0].x[e] + grad.x[e] * (x.x[e] - mean) * scale; });
        sums[1] = each([&](int e) { return sums[1].x[e] + grad.x[e]; });
    }
};
