// The plain kernels: any head size up to 128 that is a multiple of 4, float32, one token at a time, no cap on the
// decays. Thread (x, y) of a head's block owns a strip of 16 state elements: row x, columns 16 y .. 16 y + 15, or
// column x, rows 16 y .. (a head size that 16 does not divide is padded with zeros). Sums over the other dimension go
// through shared memory, one partial sum a strip.
#pragma once
#include "common/tile.cuh"
#include "wkv6/arguments.cuh"

constexpr int STRIP = 16;
constexpr int MAX_HEAD_SIZE = 128;
constexpr int MAX_STRIPS = MAX_HEAD_SIZE / STRIP;

// Past this exp(w), a decay and its derivative are zero in float32.
constexpr float NO_GRADIENT = 20.0f;

// One token's inputs and u, zeros past the head size.
struct TokenShared {
    float r[MAX_HEAD_SIZE], k[MAX_HEAD_SIZE], v[MAX_HEAD_SIZE], decay[MAX_HEAD_SIZE], gy[MAX_HEAD_SIZE];
    float u[MAX_HEAD_SIZE];
};

// Loads token t. The kernels read other threads' channels only before a token's second barrier, and after it at most
// the channel that they load themselves; so nothing is overwritten too early.
__device__ void load_token(TokenShared& token, const Arguments& a, const Sequence& s, int t) {
    const index_t at = s.elements + t * s.stride;
    for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < MAX_HEAD_SIZE; c += blockDim.x * blockDim.y) {
        const bool valid = c < a.head_size;
        token.r[c] = valid ? ((const float*)a.r)[at + c] : 0.f;
        token.k[c] = valid ? ((const float*)a.k)[at + c] : 0.f;
        token.v[c] = valid ? ((const float*)a.v)[at + c] : 0.f;
        token.decay[c] = valid ? expf(-expf(((const float*)a.w)[at + c])) : 0.f;
        token.u[c] = valid ? a.u[s.channel(a) + c] : 0.f;
        token.gy[c] = valid && a.gy ? ((const float*)a.gy)[at + c] : 0.f;
    }
    __syncthreads();
}

__device__ __forceinline__ float strip_dot(const float* x, const float* y) {
    float sum = 0.f;
    #pragma unroll
    for (int i = 0; i < STRIP; i++) sum += x[i] * y[i];
    return sum;
}

__device__ __forceinline__ float strip_sum(const float (*partial)[MAX_HEAD_SIZE]) {
    float sum = 0.f;
    for (int y = 0; y < (int)blockDim.y; y++) sum += partial[y][threadIdx.x];
    return sum;
}

// A strip of a state in global memory: of row x, or of column x if `transposed`. A null source is zeros.
__device__ __forceinline__ void load_strip(float* strip, const float* source, int N, bool transposed) {
    #pragma unroll
    for (int i = 0; i < STRIP; i++) {
        const int x = threadIdx.x, other = threadIdx.y * STRIP + i;
        strip[i] = source && other < N ? source[transposed ? other * N + x : x * N + other] : 0.f;
    }
}
__device__ __forceinline__ void store_strip(float* target, const float* strip, int N, bool transposed) {
    #pragma unroll
    for (int i = 0; i < STRIP; i++) {
        const int x = threadIdx.x, other = threadIdx.y * STRIP + i;
        if (other < N) target[transposed ? other * N + x : x * N + other] = strip[i];
    }
}

__device__ void plain_forward(const Arguments& a) {
    __shared__ TokenShared token;
    __shared__ float partial[MAX_STRIPS][MAX_HEAD_SIZE];
    const Sequence s(a);
    const int x = threadIdx.x, y = threadIdx.y, N = a.head_size, c0 = y * STRIP;
    float S[STRIP];  // column x, rows c0 + i
    load_strip(S, a.state ? a.state + s.state : nullptr, N, true);

    for (int t = 0; t < s.length; t++) {
        if (a.checkpoints && t % SEGMENT == 0) store_strip(s.slot(a, t), S, N, true);
        load_token(token, a, s, t);
        const float v = token.v[x];
        float sum = 0.f;
        #pragma unroll
        for (int i = 0; i < STRIP; i++) {
            const float kv = token.k[c0 + i] * v;
            sum += token.r[c0 + i] * (S[i] + token.u[c0 + i] * kv);
            S[i] = token.decay[c0 + i] * S[i] + kv;
        }
        partial[y][x] = sum;
        __syncthreads();
        if (y == 0) store((float*)a.y + s.elements + t * s.stride + x, strip_sum(partial));
    }
    if (a.final_state) store_strip(a.final_state + s.state, S, N, true);
}

// Per segment: forward from its checkpoint for gr, then in reverse for gk, gv and gw. With dS_t the gradient with
// respect to S_t and G_t = <S_t, dS_t> over a row, the log decay's gradient is dw_t = G_t - k_t (dS_t v_t), and
// G_{t-1} = dw_t + r_t (S_{t-1} gy_t): a scan that starts anew from the states themselves at each segment's end.
__device__ void plain_backward(const Arguments& a) {
    __shared__ TokenShared token;
    __shared__ float partial[2][MAX_STRIPS][MAX_HEAD_SIZE], gy_v[MAX_STRIPS], r_u_k[MAX_STRIPS];
    __shared__ float r_gr[SEGMENT][MAX_HEAD_SIZE];
    const Sequence s(a);
    const int x = threadIdx.x, y = threadIdx.y, N = a.head_size, c0 = y * STRIP;
    const float* ends = a.group ? a.parts : a.gfinal;
    const float* final = ends && s.length >= 0 ? ends + s.state : nullptr;
    float S[STRIP], dS[STRIP], dSt[STRIP];  // row x of S and of dS, column x of dS; the others c0 + i
    load_strip(dS, final, N, false);
    load_strip(dSt, final, N, true);
    float gu = 0.f, G = 0.f;

    for (int begin = (s.length - 1) / SEGMENT * SEGMENT; begin >= 0 && s.length > 0; begin -= SEGMENT) {
        const int end = min(begin + SEGMENT, s.length);
        load_strip(S, s.slot(a, begin), N, false);
        for (int t = begin; t < end; t++) {
            load_token(token, a, s, t);
            partial[0][y][x] = strip_dot(S, &token.gy[c0]);
            if (x == 0) gy_v[y] = strip_dot(&token.gy[c0], &token.v[c0]);
            #pragma unroll
            for (int i = 0; i < STRIP; i++) S[i] = token.decay[x] * S[i] + token.k[x] * token.v[c0 + i];
            __syncthreads();
            if (y == 0) {
                const float gr = strip_sum(partial[0]);
                float bonus = 0.f;
                for (int i = 0; i < (int)blockDim.y; i++) bonus += gy_v[i];
                r_gr[t - begin][x] = token.r[x] * gr;
                store((float*)a.gr + s.elements + t * s.stride + x, gr + token.u[x] * token.k[x] * bonus);
            }
        }
        __syncthreads();  // the last token's partial sums have been read
        partial[0][y][x] = strip_dot(S, dS);
        __syncthreads();
        if (y == 0) G = strip_sum(partial[0]);

        for (int t = end - 1; t >= begin; t--) {
            load_token(token, a, s, t);
            partial[0][y][x] = strip_dot(dS, &token.v[c0]);
            partial[1][y][x] = strip_dot(dSt, &token.k[c0]);
            if (x == 0) {
                float sum = 0.f;
                for (int i = 0; i < STRIP; i++) sum += token.r[c0 + i] * token.u[c0 + i] * token.k[c0 + i];
                r_u_k[y] = sum;
                gy_v[y] = strip_dot(&token.gy[c0], &token.v[c0]);
            }
            #pragma unroll
            for (int i = 0; i < STRIP; i++) {
                dS[i] = token.decay[x] * dS[i] + token.r[x] * token.gy[c0 + i];
                dSt[i] = token.decay[c0 + i] * dSt[i] + token.r[c0 + i] * token.gy[x];
            }
            __syncthreads();
            if (y == 0) {
                const index_t at = s.elements + t * s.stride + x;
                const float gk = strip_sum(partial[0]), rate = expf(((const float*)a.w)[at]);
                float bonus = 0.f, diagonal = 0.f;
                for (int i = 0; i < (int)blockDim.y; i++) {
                    bonus += gy_v[i];
                    diagonal += r_u_k[i];
                }
                const float gdecay = G - token.k[x] * gk;
                G = gdecay + r_gr[t - begin][x];
                gu += token.r[x] * token.k[x] * bonus;
                store((float*)a.gk + at, gk + token.u[x] * token.r[x] * bonus);
                store((float*)a.gv + at, strip_sum(partial[1]) + token.gy[x] * diagonal);
                store((float*)a.gw + at, rate > NO_GRADIENT ? 0.f : -rate * gdecay);
            }
        }
    }
    if (y == 0) a.gu[s.channels + x] = gu;
    if (a.gstate && !a.group) store_strip(a.gstate + s.state, dS, N, false);
}
