// The plain kernels: any head size up to 128 that is a multiple of 4, float32.
//
// Rows of the state, one for each value, do not depend on each other, forward or backward: row(S) needs only its own
// removed = row . a, and so does the gradient's row. Thread (x, y) of a head's block owns a strip of row y, columns
// 16 x .. 16 x + 15 (a head size that 16 does not divide is padded with zeros); sums over a row are shuffles among
// neighbouring lanes. The gradients of r, w, k, a, b are sums over columns: for them the thread then owns column y,
// rows 16 x .. .
//
// No state is stepped back: a chunk's states are computed again from the one before it, for each token in turn.
#pragma once
#include "common/chunk.cuh"
#include "wkv7/arguments.cuh"

constexpr int STRIP = 16;
constexpr int MAX_HEAD_SIZE = 128;

// Some tokens' inputs, zeros past the head size.
struct PlainShared {
    using Rows = float[CHUNK][MAX_HEAD_SIZE];
    Rows r, decay, k, v, a, b, gy;
    Rows removed, gremoved;  // S_{t-1} a_t, and its gradient
};

// Loads `valid` tokens from token t0 on.
__device__ void load_tokens(PlainShared& shared, const Arguments& a, const Sequence& s, int t0, int valid) {
    const auto element = [&](const void* tensor, index_t at) { return ((const float*)tensor)[at]; };
    const int threads = blockDim.x * blockDim.y;
    __syncthreads();  // nobody reads the previous tokens any more
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < valid * MAX_HEAD_SIZE; i += threads) {
        const int t = i / MAX_HEAD_SIZE, c = i % MAX_HEAD_SIZE;
        const index_t at = s.elements + (t0 + t) * s.stride + c;
        const bool present = c < a.head_size;
        shared.r[t][c] = present ? element(a.r, at) : 0.f;
        shared.decay[t][c] = present ? expf(DECAY_RATE / (1.f + expf(-element(a.w, at)))) : 0.f;
        shared.k[t][c] = present ? element(a.k, at) : 0.f;
        shared.v[t][c] = present ? element(a.v, at) : 0.f;
        shared.a[t][c] = present ? element(a.a, at) : 0.f;
        shared.b[t][c] = present ? element(a.b, at) : 0.f;
        shared.gy[t][c] = present && a.gy ? element(a.gy, at) : 0.f;
        shared.removed[t][c] = 0.f;
        shared.gremoved[t][c] = 0.f;
    }
    __syncthreads();  // the tokens have arrived
}

// A strip of a state in global memory: of row y, or of column y if `column`. A null source is zeros.
__device__ __forceinline__ void load_strip(float* strip, const float* source, int N, bool column) {
    #pragma unroll
    for (int i = 0; i < STRIP; i++) {
        const int y = threadIdx.y, other = threadIdx.x * STRIP + i;
        const bool present = source && y < N && other < N;
        strip[i] = present ? source[column ? other * N + y : y * N + other] : 0.f;
    }
}
__device__ __forceinline__ void store_row(float* target, const float* strip, int N) {
    #pragma unroll
    for (int i = 0; i < STRIP; i++) {
        const int y = threadIdx.y, other = threadIdx.x * STRIP + i;
        if (y < N && other < N) target[y * N + other] = strip[i];
    }
}

// The dot product of a row or a column with x: its strips are in neighbouring lanes.
__device__ __forceinline__ float whole_dot(const float* strip, const float* x) {
    float sum = 0.f;
    #pragma unroll
    for (int i = 0; i < STRIP; i++) sum += strip[i] * x[i];
    for (int lanes = 1; lanes < (int)blockDim.x; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    return sum;
}

// Advances a row of the state from before to after token t -> removed.
__device__ __forceinline__ float step_row(float* S, const PlainShared& in, int t) {
    const int c0 = threadIdx.x * STRIP;
    const float removed = whole_dot(S, &in.a[t][c0]), v = in.v[t][threadIdx.y];
    #pragma unroll
    for (int i = 0; i < STRIP; i++) S[i] = in.decay[t][c0 + i] * S[i] + removed * in.b[t][c0 + i] + v * in.k[t][c0 + i];
    return removed;
}

// The same for a column, given in.removed.
__device__ __forceinline__ void step_column(float* S, const PlainShared& in, int t) {
    const int v0 = threadIdx.x * STRIP, c = threadIdx.y;
    const float decay = in.decay[t][c], b = in.b[t][c], k = in.k[t][c];
    #pragma unroll
    for (int i = 0; i < STRIP; i++) S[i] = decay * S[i] + in.removed[t][v0 + i] * b + in.v[t][v0 + i] * k;
}

__device__ void plain_forward(const Arguments& a) {
    PlainShared& shared = *(PlainShared*)dynamic_shared();
    const Sequence s(a);
    const int row = threadIdx.y, c0 = threadIdx.x * STRIP, N = a.head_size;
    float S[STRIP];
    load_strip(S, a.state ? a.state + s.state : nullptr, N, false);

    for (int t0 = 0; t0 < s.length; t0 += CHUNK) {
        const int valid = min(CHUNK, s.length - t0);
        if (a.checkpoints && t0 % SEGMENT == 0) store_row(s.slot(a, t0), S, N);
        load_tokens(shared, a, s, t0, valid);
        for (int t = 0; t < valid; t++) {
            step_row(S, shared, t);
            const float y = whole_dot(S, &shared.r[t][c0]);
            if (threadIdx.x == 0 && row < N) store((float*)a.y + s.elements + (t0 + t) * s.stride + row, y);
        }
    }
    if (a.final_state) store_row(a.final_state + s.state, S, N);
}

// The gradients of r, w, k, a and b over some tokens, from a column of the state before them and of the gradient dS
// after them, which becomes that before them.
__device__ void column_gradients(const Arguments& a, const Sequence& s, const PlainShared& in, int t0, int valid,
                                 const float* start, float* dS) {
    const int v0 = threadIdx.x * STRIP, c = threadIdx.y;
    for (int t = valid - 1; t >= 0; t--) {
        float S[STRIP];
        #pragma unroll
        for (int i = 0; i < STRIP; i++) {
            S[i] = start[i];
            dS[i] += in.gy[t][v0 + i] * in.r[t][c];
        }
        for (int before = 0; before < t; before++) step_column(S, in, before);
        const float gk = whole_dot(dS, &in.v[t][v0]), gb = whole_dot(dS, &in.removed[t][v0]);
        const float ga = whole_dot(S, &in.gremoved[t][v0]), gdecay = whole_dot(S, dS);
        step_column(S, in, t);
        const float gr = whole_dot(S, &in.gy[t][v0]);
        #pragma unroll
        for (int i = 0; i < STRIP; i++) dS[i] = in.decay[t][c] * dS[i] + in.gremoved[t][v0 + i] * in.a[t][c];
        if (threadIdx.x != 0 || c >= a.head_size) continue;
        const index_t at = s.elements + (t0 + t) * s.stride + c;
        // sigmoid(w) sigmoid(-w), in which no digits cancel
        const float e = expf(-fabsf(((const float*)a.w)[at])), slope = DECAY_RATE * e / ((1.f + e) * (1.f + e));
        store((float*)a.gr + at, gr);
        store((float*)a.gw + at, gdecay * in.decay[t][c] * slope);
        store((float*)a.gk + at, gk);
        store((float*)a.ga + at, ga);
        store((float*)a.gb + at, gb);
    }
}

__device__ void plain_backward(const Arguments& a) {
    PlainShared& shared = *(PlainShared*)dynamic_shared();
    const Sequence s(a);
    const int row = threadIdx.y, c0 = threadIdx.x * STRIP, N = a.head_size;
    const float* gfinal = a.gfinal ? a.gfinal + s.state : nullptr;
    float S[STRIP], dS[STRIP];  // of a row
    float S_column[STRIP], dS_column[STRIP];
    load_strip(dS, gfinal, N, false);
    load_strip(dS_column, gfinal, N, true);

    for (int t0 = (s.length - 1) / CHUNK * CHUNK; t0 >= 0 && s.length > 0; t0 -= CHUNK) {
        const float* slot = s.slot(a, t0);
        load_strip(S, slot, N, false);
        load_strip(S_column, slot, N, true);
        int valid = CHUNK;
        for (int from = t0 / SEGMENT * SEGMENT; from <= t0; from += CHUNK) {
            valid = min(CHUNK, s.length - from);
            load_tokens(shared, a, s, from, valid);
            for (int t = 0; t < valid; t++) {
                const float removed = step_row(S, shared, t);
                if (threadIdx.x == 0) shared.removed[t][row] = removed;
            }
            if (from == t0) continue;
            __syncthreads();  // removed is known
            for (int t = 0; t < valid; t++) step_column(S_column, shared, t);
        }

        for (int t = valid - 1; t >= 0; t--) {
            #pragma unroll
            for (int i = 0; i < STRIP; i++) dS[i] += shared.gy[t][row] * shared.r[t][c0 + i];
            const float gv = whole_dot(dS, &shared.k[t][c0]), gremoved = whole_dot(dS, &shared.b[t][c0]);
            #pragma unroll
            for (int i = 0; i < STRIP; i++) dS[i] = shared.decay[t][c0 + i] * dS[i] + gremoved * shared.a[t][c0 + i];
            if (threadIdx.x != 0) continue;
            shared.gremoved[t][row] = gremoved;
            if (row < N) store((float*)a.gv + s.elements + (t0 + t) * s.stride + row, gv);
        }
        __syncthreads();  // removed and its gradient are known
        column_gradients(a, s, shared, t0, valid, S_column, dS_column);
    }
    if (a.gstate) store_row(a.gstate + s.state, dS, N);
}
