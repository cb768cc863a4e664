// The baseline of benchmarks/wkv6.py on GPUs: RWKV-6's recurrence one token after the other, the algorithm of RWKV-LM's
// CUDA kernels (RWKV-v5/cuda/wkv6_cuda.cu) written plainly, head size 64.
//
// One thread block a head and sequence, one thread a channel. A thread keeps a row or a column of the state in
// registers and walks through all tokens; what other channels must know of a token goes through shared memory. No
// chunks, no tensor cores, no initial state. Where RWKV-LM compiles anew for each sequence length, to keep an array of
// a float a token in each thread, backward keeps that in `checkpoints`, (tokens, heads, 64) float32, which the caller
// provides.
#include "common/device.cuh"
#include "common/tile.cuh"
#include "wkv6/arguments.cuh"

constexpr int N = 64;

template <class T>
__device__ __forceinline__ float value(const void* p, index_t at) {
    return to_float(((const T*)p)[at]);
}

// y: thread j has column j of S.
template <class T>
__device__ void forward_columns(const Arguments& a) {
    __shared__ float r[N], k[N], decay[N], u[N];
    const Sequence s(a);
    const int j = threadIdx.x;
    float S[N] = {};
    u[j] = a.u[s.channel(a) + j];
    for (int t = 0; t < s.length; t++) {
        const index_t at = s.elements + t * s.stride + j;
        __syncthreads();
        r[j] = value<T>(a.r, at);
        k[j] = value<T>(a.k, at);
        decay[j] = expf(-expf(value<T>(a.w, at)));
        __syncthreads();
        const float v = value<T>(a.v, at);
        float y = 0.f;
        #pragma unroll
        for (int i = 0; i < N; i++) {
            const float kv = k[i] * v;
            y += r[i] * (S[i] + u[i] * kv);
            S[i] = decay[i] * S[i] + kv;
        }
        store((T*)a.y + at, y);
    }
}

// The gradients of r, k, w, u: thread i has row i of S, then of S's gradient D. With G_t = <S_t, D_t> over the row, the
// log decay's gradient is G_t - k_t (D_t v_t), and G_{t-1} is that plus r_t (S_{t-1} gy_t), which the first walk leaves
// behind.
template <class T>
__device__ void backward_rows(const Arguments& a) {
    __shared__ float v[N], gy[N];
    const Sequence s(a);
    const int i = threadIdx.x;
    const float u = a.u[s.channel(a) + i];
    float S[N] = {}, gu = 0.f;
    for (int t = 0; t < s.length; t++) {
        const index_t at = s.elements + t * s.stride + i;
        __syncthreads();
        v[i] = value<T>(a.v, at);
        gy[i] = value<T>(a.gy, at);
        __syncthreads();
        const float r = value<T>(a.r, at), k = value<T>(a.k, at), decay = expf(-expf(value<T>(a.w, at)));
        float gr = 0.f, bonus = 0.f;
        #pragma unroll
        for (int j = 0; j < N; j++) {
            gr += S[j] * gy[j];
            bonus += gy[j] * v[j];
            S[j] = decay * S[j] + k * v[j];
        }
        a.checkpoints[at] = r * gr;
        gu += r * k * bonus;
        store((T*)a.gr + at, gr + u * k * bonus);
    }
    a.gu[s.channels + i] = gu;

    #pragma unroll
    for (int j = 0; j < N; j++) S[j] = 0.f;  // D from here on
    float G = 0.f;
    for (int t = s.length - 1; t >= 0; t--) {
        const index_t at = s.elements + t * s.stride + i;
        __syncthreads();
        v[i] = value<T>(a.v, at);
        gy[i] = value<T>(a.gy, at);
        __syncthreads();
        const float r = value<T>(a.r, at), k = value<T>(a.k, at), rate = expf(value<T>(a.w, at)), decay = expf(-rate);
        float gk = 0.f, bonus = 0.f;
        #pragma unroll
        for (int j = 0; j < N; j++) {
            gk += S[j] * v[j];
            bonus += gy[j] * v[j];
            S[j] = decay * S[j] + r * gy[j];
        }
        const float gdecay = G - k * gk;
        G = gdecay + a.checkpoints[at];
        store((T*)a.gk + at, gk + u * r * bonus);
        store((T*)a.gw + at, -rate * gdecay);
    }
}

// The gradient of v: thread j has column j of D.
template <class T>
__device__ void backward_columns(const Arguments& a) {
    __shared__ float r[N], k[N], decay[N], u[N];
    const Sequence s(a);
    const int j = threadIdx.x;
    float D[N] = {};
    u[j] = a.u[s.channel(a) + j];
    for (int t = s.length - 1; t >= 0; t--) {
        const index_t at = s.elements + t * s.stride + j;
        __syncthreads();
        r[j] = value<T>(a.r, at);
        k[j] = value<T>(a.k, at);
        decay[j] = expf(-expf(value<T>(a.w, at)));
        __syncthreads();
        const float gy = value<T>(a.gy, at);
        float gv = 0.f;
        #pragma unroll
        for (int i = 0; i < N; i++) {
            gv += k[i] * (D[i] + u[i] * r[i] * gy);
            D[i] = decay[i] * D[i] + r[i] * gy;
        }
        store((T*)a.gv + at, gv);
    }
}

RECURRENCE_KERNEL(sequential_forward_float32, forward_columns<float>, N, 1, 0)
RECURRENCE_KERNEL(sequential_forward_bfloat16, forward_columns<bf16>, N, 1, 0)
RECURRENCE_KERNEL(sequential_rows_float32, backward_rows<float>, N, 1, 0)
RECURRENCE_KERNEL(sequential_rows_bfloat16, backward_rows<bf16>, N, 1, 0)
RECURRENCE_KERNEL(sequential_columns_float32, backward_columns<float>, N, 1, 0)
RECURRENCE_KERNEL(sequential_columns_bfloat16, backward_columns<bf16>, N, 1, 0)
