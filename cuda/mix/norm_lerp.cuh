// Layer norm and token shift with interpolation in one pass, for frozen norms and weights: the normalized input is not
// read back from memory. A block has a strip of tokens; forward normalizes the token before the strip again, backward
// reads the gradients of the token after it again. norm_rows.cuh and lerp.cuh have the formulas.
#pragma once
#include "mix/lerp.cuh"
#include "mix/norm_rows.cuh"

constexpr int MOST_MIXED = 4096;  // channels
// Forward's blocks on a multiprocessor: four, but fewer on Blackwell, for which the compiler would spill registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int NORM_LERP_BLOCKS = 3;
#else
constexpr int NORM_LERP_BLOCKS = 4;
#endif

struct Strip {
    index_t begin, end;
    __device__ explicit Strip(const MixArguments& a)
        : begin((index_t)blockIdx.x * a.strip), end(min(begin + a.strip, a.tokens)) {}
};
// True if token t begins a sequence, or is past the last one.
__device__ __forceinline__ bool begins(const MixArguments& a, index_t t) {
    return t == a.tokens || place_of(a, t).first;
}
__device__ __forceinline__ index_t sequence_at(const MixArguments& a, const Place& place) {
    return (index_t)place.sequence * a.channels;
}

// x; weight, bias, maa (n, channels) -> stats, the last of each sequence's norms, n points
__device__ void norm_lerp_forward(const MixArguments& a) {
    float *row = (float*)dynamic_shared(), *before = row + MOST_MIXED;
    const Strip strip(a);
    for (index_t t = strip.begin - !begins(a, strip.begin); t < strip.end; t++) {
        const bool own = t >= strip.begin, ends = begins(a, t + 1);
        const Place place = place_of(a, t);
        const RowStats stats = read_row(a, t, row, own);
        each_own(a, [&](int c) {
            float x[V], previous[V] = {};
            normalize_row(a, stats, row, c, x);
            #pragma unroll
            for (int e = 0; e < V; e++) {
                x[e] = rounded(x[e]);
                if (!place.first) previous[e] = before[c + e];
                before[c + e] = x[e];
            }
            if (!own) return;
            const index_t at = t * a.channels + c;
            if (place.first && a.last) load_vector<bf16, V>(previous, (const bf16*)a.last + sequence_at(a, place) + c);
            if (ends) store_vector<bf16, V>((bf16*)a.outputs[1] + sequence_at(a, place) + c, x);
            #pragma unroll 1  // not more, which take registers that a fourth block needs
            for (int i = 0; i < a.n; i++) {
                float m[V];
                load_vector<bf16, V>(m, (const bf16*)a.parameters[2] + i * a.channels + c);
                #pragma unroll
                for (int e = 0; e < V; e++) m[e] = x[e] + (previous[e] - x[e]) * m[e];
                store_vector<bf16, V>((bf16*)a.outputs[2 + i] + at, m);
            }
        });
    }
}

// Adds up token t's gradients of the points, for itself and for the token before it.
__device__ __forceinline__ void pass_back(const MixArguments& a, index_t t, int c, float (&own)[V],
                                          float (&passed)[V]) {
    for (int i = 0; i < a.n; i++) {
        float m[V], grad[V];
        load_vector<bf16, V>(m, (const bf16*)a.parameters[1] + i * a.channels + c);
        load_vector<bf16, V>(grad, (const bf16*)a.inputs[5 + i] + t * a.channels + c);
        #pragma unroll
        for (int e = 0; e < V; e++) own[e] += grad[e] * (1.f - m[e]), passed[e] += grad[e] * m[e];
    }
}

// x, grad of its norm or null, grad of x from the residual, stats, grad of the last of each sequence's norms or null, n
// grads of points; weight, maa -> the gradient of x; glast
__device__ void norm_lerp_backward(const MixArguments& a) {
    float *row = (float*)dynamic_shared(), *later = row + MOST_MIXED;  // later: the gradient from the next token
    const Strip strip(a);
    if (!begins(a, strip.end))
        each_own(a, [&](int c) {
            float own[V] = {}, passed[V] = {};
            pass_back(a, strip.end, c, own, passed);
        #pragma unroll
            for (int e = 0; e < V; e++) later[c + e] = passed[e];
        });
    for (index_t t = strip.end - 1; t >= strip.begin; t--) {
        const bool ends = begins(a, t + 1);
        const Place place = place_of(a, t);
        const RowStats stats = stats_of(a, t);
        float sum = 0.f, along = 0.f;
        each_own(a, [&](int c) {
            const index_t at = t * a.channels + c;
            float grad[V] = {}, passed[V] = {}, end[V] = {};
            if (a.inputs[1]) load_vector<bf16, V>(grad, (const bf16*)a.inputs[1] + at);
            if (ends && a.inputs[4]) load_vector<bf16, V>(end, (const bf16*)a.inputs[4] + sequence_at(a, place) + c);
            pass_back(a, t, c, grad, passed);
            #pragma unroll
            for (int e = 0; e < V; e++) {
                grad[e] += ends ? end[e] : later[c + e];
                later[c + e] = passed[e];
            }
            if (place.first && a.glast) store_vector<bf16, V>((bf16*)a.glast + sequence_at(a, place) + c, passed);
            gather_row(a, stats, t, c, grad, row, sum, along);
        });
        store_row_gradient(a, stats, t, row, sum, along);
    }
}
