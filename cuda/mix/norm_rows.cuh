// Shared by kernels that normalize whole tokens, out = (x - mean) scale weight + bias over all channels of a block's
// token, or compute its gradient and add that of the residual, x's second user. Mean and scale, 1 / standard deviation,
// are saved for backward. Tensors are bfloat16 and aligned to 16 bytes, channels a multiple of 8.
#pragma once
#include "common/vector.cuh"
#include "mix/rows.cuh"

constexpr int NORM_THREADS = 256;
constexpr int V = WIDEST<bf16>;  // neighbouring channels that a thread reads at once

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

// f(c) for each V neighbours c, c + 1, … among a thread's channels.
template <class F>
__device__ __forceinline__ void each_own(const MixArguments& a, F f) {
    for (int c = threadIdx.x * V; c < a.channels; c += NORM_THREADS * V) f(c);
}

// x rounded to bfloat16.
__device__ __forceinline__ float rounded(float x) {
    bf16 e;
    store(&e, x);
    return to_float(e);
}

struct RowStats { float mean, scale; };  // scale: 1 / standard deviation

__device__ __forceinline__ RowStats stats_of(const MixArguments& a, index_t t) {
    return RowStats{((const float*)a.inputs[3])[2 * t], ((const float*)a.inputs[3])[2 * t + 1]};
}

// row = token t of x; its stats are written if the token is the block's own.
__device__ RowStats read_row(const MixArguments& a, index_t t, float* row, bool own) {
    float sum = 0.f;
    each_own(a, [&](int c) {
        float x[V];
        load_vector<bf16, V>(x, (const bf16*)a.inputs[0] + t * a.channels + c);
        #pragma unroll
        for (int e = 0; e < V; e++) row[c + e] = x[e], sum += x[e];
    });
    const float mean = block_total(sum) / a.channels;
    float squares = 0.f;
    each_own(a, [&](int c) {
        #pragma unroll
        for (int e = 0; e < V; e++) squares += (row[c + e] - mean) * (row[c + e] - mean);
    });
    const float scale = 1.f / sqrtf(block_total(squares) / a.channels + a.eps);
    if (own && threadIdx.x == 0) ((float*)a.outputs[0])[2 * t] = mean, ((float*)a.outputs[0])[2 * t + 1] = scale;
    return RowStats{mean, scale};
}
__device__ __forceinline__ void normalize_row(const MixArguments& a, const RowStats& stats, const float* row, int c,
                                              float (&out)[V]) {
    float weight[V];
    load_vector<bf16, V>(weight, (const bf16*)a.parameters[0] + c);
    load_vector<bf16, V>(out, (const bf16*)a.parameters[1] + c);
    #pragma unroll
    for (int e = 0; e < V; e++) out[e] += (row[c + e] - stats.mean) * stats.scale * weight[e];
}

// row = the gradient of the normalized values, from that of the norm's result; sum and along gather this thread's part
// of its sum and of its product with those values.
__device__ __forceinline__ void gather_row(const MixArguments& a, const RowStats& stats, index_t t, int c,
                                           const float (&grad)[V], float* row, float& sum, float& along) {
    float x[V], weight[V];
    load_vector<bf16, V>(x, (const bf16*)a.inputs[0] + t * a.channels + c);
    load_vector<bf16, V>(weight, (const bf16*)a.parameters[0] + c);
    #pragma unroll
    for (int e = 0; e < V; e++) {
        row[c + e] = grad[e] * weight[e];
        sum += row[c + e];
        along += row[c + e] * (x[e] - stats.mean) * stats.scale;
    }
}
// The gradient of x, from the row and the threads' sums, and that of the residual.
__device__ __forceinline__ void store_row_gradient(const MixArguments& a, const RowStats& stats, index_t t,
                                                   const float* row, float sum, float along) {
    const index_t at = t * a.channels;
    sum = block_total(sum) / a.channels;
    along = block_total(along) / a.channels;
    each_own(a, [&](int c) {
        float x[V], gx[V];
        load_vector<bf16, V>(x, (const bf16*)a.inputs[0] + at + c);
        load_vector<bf16, V>(gx, (const bf16*)a.inputs[2] + at + c);
        #pragma unroll
        for (int e = 0; e < V; e++)
            gx[e] += stats.scale * (row[c + e] - sum - (x[e] - stats.mean) * stats.scale * along);
        store_vector<bf16, V>((bf16*)a.outputs[0] + at + c, gx);
    });
}
