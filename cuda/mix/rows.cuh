// Shared by the mix kernels: a warp has one group of a token's channels in registers, four in each lane, and a block
// takes the same group of a strip of tokens. Sums over channels are shuffles; sums over tokens stay in registers until
// the strip ends, and the strips' sums are added up outside.
#pragma once
#include "common/tile.cuh"
#include "mix/arguments.cuh"

// A lane's four channels of a group: 2 l, 2 l + 1, 64 + 2 l, 64 + 2 l + 1. Those past the group's end are zeros.
struct Values { float x[4]; };

__device__ __forceinline__ int channel_of(int e) { return (e & 2) * 32 + 2 * lane_id() + (e & 1); }

__device__ __forceinline__ Values zero_values() { return Values{{0.f, 0.f, 0.f, 0.f}}; }

// f(a lane's element): Values of it.
template <class F>
__device__ __forceinline__ Values each(F f) {
    Values v;
    #pragma unroll
    for (int e = 0; e < 4; e++) v.x[e] = f(e);
    return v;
}

__device__ __forceinline__ void load_pair(const bf16* p, float* x) {
    const uint32_t pair = *(const uint32_t*)p;
    x[0] = low_half(pair), x[1] = high_half(pair);
}
__device__ __forceinline__ void store_pair(bf16* p, const float* x) { *(uint32_t*)p = pack_bf16(x[0], x[1]); }

// Loads the group's `size` channels from element `at` of p on.
__device__ __forceinline__ Values load(const void* p, index_t at, int size) {
    Values v = zero_values();
    #pragma unroll
    for (int e = 0; e < 4; e += 2)
        if (channel_of(e) < size) load_pair((const bf16*)p + at + channel_of(e), v.x + e);
    return v;
}
__device__ __forceinline__ void save(void* p, index_t at, int size, const Values& v) {
    #pragma unroll
    for (int e = 0; e < 4; e += 2)
        if (channel_of(e) < size) store_pair((bf16*)p + at + channel_of(e), v.x + e);
}

__device__ __forceinline__ float total(const Values& v) {
    float sum = v.x[0] + v.x[1] + v.x[2] + v.x[3];
    #pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    return sum;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// Values of a group, normalized; those past its end stay zeros.
struct Normal {
    Values z;
    float scale;  // 1 / standard deviation
};
__device__ __forceinline__ Normal normalize(const Values& y, int size, float eps) {
    const float mean = total(y) / size;
    const Values centred = each([&](int e) { return channel_of(e) < size ? y.x[e] - mean : 0.f; });
    const float variance = total(each([&](int e) { return centred.x[e] * centred.x[e]; })) / size;
    const float scale = 1.f / sqrtf(variance + eps);
    return Normal{each([&](int e) { return centred.x[e] * scale; }), scale};
}
// The gradient of y from that of the normalized values, d.
__device__ __forceinline__ Values normalize_backward(const Normal& n, const Values& d, int size) {
    const float mean = total(d) / size;
    const float along = total(each([&](int e) { return d.x[e] * n.z.x[e]; })) / size;
    return each([&](int e) { return n.scale * (d.x[e] - mean - n.z.x[e] * along); });
}

// A block's group and strip.
struct Part {
    index_t channel;  // the group's first
    int size;         // its channels
    index_t begin, end;
    int strip;

    __device__ explicit Part(const MixArguments& a) {
        const int groups = (a.channels + a.size - 1) / a.size;
        const index_t block = blockIdx.x;
        strip = (int)(block / groups);
        channel = block % groups * a.size;
        size = min(a.size, a.channels - (int)channel);
        begin = (index_t)strip * a.strip;
        end = min(begin + a.strip, a.tokens);
    }
};

// Runs an operation over a block's part: Op(arguments, part) holds the values of its channels, row(t) computes a token,
// and `sums`, SUMS of them, gather sums over tokens.
template <class Op>
__device__ void run_rows(const MixArguments& a) {
    const Part part(a);
    Op op(a, part);
    const int warp = threadIdx.x / 32;
    for (index_t t = part.begin + warp; t < part.end; t += WARPS) op.row(t);
    if constexpr (Op::SUMS > 0) {
        __shared__ float shared[WARPS][Op::SUMS][MOST_SIZE];
        #pragma unroll
        for (int i = 0; i < Op::SUMS; i++)
            #pragma unroll
            for (int e = 0; e < 4; e++) shared[warp][i][channel_of(e)] = op.sums[i].x[e];
        __syncthreads();
        for (int at = threadIdx.x; at < Op::SUMS * MOST_SIZE; at += WARPS * 32) {
            const int i = at / MOST_SIZE, c = at % MOST_SIZE;
            if (c >= part.size || !a.sums[i]) continue;
            float sum = 0.f;
            for (int w = 0; w < WARPS; w++) sum += shared[w][i][c];
            a.sums[i][(index_t)part.strip * a.channels + part.channel + c] = sum;
        }
    }
}

// The members of every operation.
struct Operation {
    const MixArguments& a;
    const Part part;

    __device__ Operation(const MixArguments& a, const Part& part) : a(a), part(part) {}

    __device__ index_t at(index_t t) const { return t * a.channels + part.channel; }
    __device__ Values in(int i, index_t t) const { return load(a.inputs[i], at(t), part.size); }
    __device__ Values parameter(int i) const { return load(a.parameters[i], part.channel, part.size); }
    __device__ void out(int i, index_t t, const Values& v) const {
        if (a.outputs[i]) save(a.outputs[i], at(t), part.size, v);
    }
};
