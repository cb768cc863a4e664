// Residual, layer norm and token shift with interpolation in one, for norms and points that are frozen: what is
// normalized is not read back to be mixed. A block has a strip of tokens; forward normalizes the token before it once
// more, backward reads the gradients of the token after it once more. layer_norm.cuh and lerp.cuh have the formulas.
#pragma once
#include "mix/layer_norm.cuh"
#include "mix/lerp.cuh"

constexpr int MOST_MIXED = 4096;  // channels
constexpr int FIRST_TOTAL = 10;   // of forward's outputs, the points' sums over shards
constexpr int FIRST_GTOTAL = 16;  // of backward's inputs, a point's after a point's
// Forward's blocks to a multiprocessor: four, but on Blackwell, for which the compiler would spill registers.
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
// Whether token t, which may be the one after all, begins a sequence or ends them.
__device__ __forceinline__ bool begins(const MixArguments& a, index_t t) {
    return t == a.tokens || place_of(a, t).first;
}
__device__ __forceinline__ index_t sequence_at(const MixArguments& a, const Place& place) {
    return (index_t)place.sequence * a.channels;
}

// x, y and gate or null, what was left of x, y and gate, or null each; weight, bias, maa (n, channels) -> stats, normal
// or null, the sum where there is more than x, the last of each sequence's, n points, and the sums over shards of those
// points of which they are wanted, LEFTS at most
template <class E, int V>
__device__ void norm_lerp_forward_by(const MixArguments& a) {
    float *row = (float*)dynamic_shared(), *before = row + MOST_MIXED;
    const Strip strip(a);
    for (index_t t = strip.begin - !begins(a, strip.begin); t < strip.end; t++) {
        const bool own = t >= strip.begin, ends = begins(a, t + 1);
        const Place place = place_of(a, t);
        const RowStats stats = sum_row<E, V>(a, t, row, own);
        ShardSums<V> totals;
        each_own<V>(a, [&](int c) {
            float x[V], previous[V] = {};
            normalize_row<E, V>(a, stats, row, c, x);
            #pragma unroll
            for (int e = 0; e < V; e++) {
                x[e] = rounded<E>(x[e]);
                if (!place.first) previous[e] = before[c + e];
                before[c + e] = x[e];
            }
            if (!own) return;
            const index_t at = t * a.channels + c;
            if (place.first && a.last) load_vector<E, V>(previous, (const E*)a.last + sequence_at(a, place) + c);
            if (a.outputs[1]) store_vector<E, V>((E*)a.outputs[1] + at, x);
            if (ends) store_vector<E, V>((E*)a.outputs[3] + sequence_at(a, place) + c, x);
            #pragma unroll 1  // not more, which take registers that a fourth block needs
            for (int i = 0, summed = 0; i < a.n; i++) {
                float m[V];
                load_vector<E, V>(m, (const E*)a.parameters[2] + i * a.channels + c);
                #pragma unroll
                for (int e = 0; e < V; e++) m[e] = x[e] + (previous[e] - x[e]) * m[e];
                store_vector<E, V>((E*)a.outputs[4 + i] + at, m);
                if (a.summed >> i & 1) totals.add_to(summed++, m);
            }
        });
        if (own) store_shard_sums<E, V, NORM_THREADS / 32>(a, FIRST_TOTAL, t, totals, row);
    }
}

// Adds up what token t's gradients of the points and of their sums over shards give to itself and to what precedes it.
template <class E, int V>
__device__ __forceinline__ void pass_back(const MixArguments& a, index_t t, int c, float (&own)[V],
                                          float (&passed)[V]) {
    for (int i = 0; i < a.n; i++) {
        const int point = i < a.n - 1 ? i : a.last_point;
        float m[V], grad[V];
        load_vector<E, V>(m, (const E*)a.parameters[1] + point * a.channels + c);
        load_vector<E, V>(grad, (const E*)a.inputs[5 + i] + t * a.channels + c);
        add_low<E, V>(a, a.inputs[FIRST_GTOTAL + i], t, c, grad);
        #pragma unroll
        for (int e = 0; e < V; e++) own[e] += grad[e] * (1.f - m[e]), passed[e] += grad[e] * m[e];
    }
}

// The gradients of y and gate from that of x + sigmoid(gate) y, for channels c, c + 1, … of token t.
template <class E, int V>
__device__ __forceinline__ void store_gated(const MixArguments& a, index_t t, int c, const float (&grad)[V],
                                            ShardSums<V>& sums) {
    const index_t at = t * a.channels + c;
    float y[V], gate[V];
    load_vector<E, V>(y, (const E*)a.inputs[12] + at);
    load_vector<E, V>(gate, (const E*)a.inputs[13] + at);
    add_left<E, V>(a, a.inputs[14], t, c, y);
    add_left<E, V>(a, a.inputs[15], t, c, gate);
    #pragma unroll
    for (int e = 0; e < V; e++) {
        const float open = sigmoid(gate[e]);
        gate[e] = grad[e] * y[e] * open * (1.f - open);
        y[e] = grad[e] * open;
    }
    store_vector<E, V>((E*)a.outputs[1] + at, y);
    store_vector<E, V>((E*)a.outputs[2] + at, gate);
    sums.add(1, y);
    sums.add(2, gate);
}

// sum, grad of normal or null, grad of sum, stats, grad of the last of each sequence's or null, n grads of points, y
// and gate or null, what was left of them or null, of each point the gradient of its sum over shards or null; weight,
// maa -> the gradient of x, those of y and gate, and those of what was left of the three, or null each; glast
template <class E, int V>
__device__ void norm_lerp_backward_by(const MixArguments& a) {
    float *row = (float*)dynamic_shared(), *later = row + MOST_MIXED;  // later: what the token after passes back
    const Strip strip(a);
    if (!begins(a, strip.end))
        each_own<V>(a, [&](int c) {
            float own[V] = {}, passed[V] = {};
            pass_back<E, V>(a, strip.end, c, own, passed);
        #pragma unroll
            for (int e = 0; e < V; e++) later[c + e] = passed[e];
        });
    for (index_t t = strip.end - 1; t >= strip.begin; t--) {
        const bool ends = begins(a, t + 1);
        const Place place = place_of(a, t);
        const RowStats stats = stats_of(a, t);
        float sum = 0.f, along = 0.f;
        each_own<V>(a, [&](int c) {
            const index_t at = t * a.channels + c;
            float grad[V] = {}, passed[V] = {}, end[V] = {};
            if (a.inputs[1]) load_vector<E, V>(grad, (const E*)a.inputs[1] + at);
            if (ends && a.inputs[4]) load_vector<E, V>(end, (const E*)a.inputs[4] + sequence_at(a, place) + c);
            pass_back<E, V>(a, t, c, grad, passed);
            #pragma unroll
            for (int e = 0; e < V; e++) {
                grad[e] += ends ? end[e] : later[c + e];
                later[c + e] = passed[e];
            }
            if (place.first && a.glast) store_vector<E, V>((E*)a.glast + sequence_at(a, place) + c, passed);
            gather_row<E, V>(a, stats, t, c, grad, row, sum, along);
        });
        ShardSums<V> sums;
        store_row_gradient<E, V>(a, stats, t, row, sum, along, [&](int c, const float (&grad)[V]) {
            sums.add(0, grad);
            if (a.inputs[13]) store_gated<E, V>(a, t, c, grad, sums);
        });
        store_shard_sums<E, V, NORM_THREADS / 32>(a, 3, t, sums, row);
    }
}

template <class E>
__device__ void norm_lerp_forward(const MixArguments& a) {
    if (a.size == WIDEST<E>)
        norm_lerp_forward_by<E, WIDEST<E>>(a);
    else
        norm_lerp_forward_by<E, 2>(a);
}
template <class E>
__device__ void norm_lerp_backward(const MixArguments& a) {
    if (a.size == WIDEST<E>)
        norm_lerp_backward_by<E, WIDEST<E>>(a);
    else
        norm_lerp_backward_by<E, 2>(a);
}
