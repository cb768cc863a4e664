// What the two chunked kernels share: a chunk of 16 tokens in shared memory, and its decays. The head comment of
// wkv6_cuda.cu explains the names.
#pragma once

constexpr int CHUNK = 16;
constexpr float LOG2_E = 1.4426950408889634f;

// A step's decay is taken as 2^-x with x at most this, so that eight of them, and the reciprocal of their product,
// stay well inside bf16's range. A decay below 2^-14 leaves nothing that bf16 could show anyway.
constexpr float DECAY_CAP = 14.0f;

// A block has 2 N threads: warps of 16 rows for the matrix products, (channel pair, quarter) for the decays, and
// one 16-byte copy each for a chunk of one tensor.
template <int N> struct Shape {
    static constexpr int threads = 2 * N;
    static constexpr int tiles = N / 16;
    static constexpr int stride = N + 8;  // rows of a chunk, padded so that eight of them touch all banks once
    using Rows = bf16[CHUNK][stride];
};

// The operands made of one chunk; element (t, c) as the head comment of wkv6_cuda.cu defines them.
template <int N> struct Operands {
    typename Shape<N>::Rows r_start, r_middle, k_middle, k_end;
    float quarter[4][N];                  // product of the decays of tokens 0-3, 4-7, 8-11, 12-15
    float first[N], second[N], whole[N];  // of tokens 0-7, 8-15, 0-15
    float bonus[CHUNK];                   // sum over c of r u k
};

// Starts the copy of the chunk that begins at token t0, zeros past the sequence's end.
template <int N>
__device__ __forceinline__ void fetch(typename Shape<N>::Rows& rows, const void* tensor, const Sequence& s, int t0) {
    const int row = threadIdx.x / (N / 8), column = threadIdx.x % (N / 8) * 8;
    const bool valid = t0 + row < s.length;
    const bf16* source = (const bf16*)tensor + s.elements + (valid ? (t0 + row) * s.stride + column : 0);
    cp_async_16(&rows[row][column], source, valid);
}

// log2 of a decay's reciprocal, from the raw w. A NaN stays one.
__device__ __forceinline__ float log2_decay(float w) {
    const float x = exp2_approx(w * LOG2_E) * LOG2_E;
    return x > DECAY_CAP ? DECAY_CAP : x;
}

// A thread's share of a chunk's decays: channels c and c + 1, four tokens from t.
template <int N> struct Decays {
    int c, t, part;
    float decay[4][2], first[2], second[2];

    // Reads w and writes the products of the quarters.
    __device__ __forceinline__ Decays(const typename Shape<N>::Rows& w, int valid, Operands<N>& o) {
        c = threadIdx.x % (N / 2) * 2;
        part = threadIdx.x / (N / 2);
        t = part * 4;
        float product[2] = {1.f, 1.f};
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t pair = *(const uint32_t*)&w[t + i][c];
            decay[i][0] = t + i < valid ? exp2_approx(-log2_decay(low_half(pair))) : 1.f;
            decay[i][1] = t + i < valid ? exp2_approx(-log2_decay(high_half(pair))) : 1.f;
            product[0] *= decay[i][0];
            product[1] *= decay[i][1];
        }
        o.quarter[part][c] = product[0];
        o.quarter[part][c + 1] = product[1];
    }

    // Takes the halves' products from the quarters, which all threads must have written, and shares them.
    __device__ __forceinline__ void halves(Operands<N>& o) {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            first[j] = o.quarter[0][c + j] * o.quarter[1][c + j];
            second[j] = o.quarter[2][c + j] * o.quarter[3][c + j];
            if (part != 0) continue;
            o.first[c + j] = first[j];
            o.second[c + j] = second[j];
            o.whole[c + j] = first[j] * second[j];
        }
    }

    // read[i]: the decays between the chunk's middle and token t + i's read of the state; their reciprocal before
    // the middle.
    __device__ __forceinline__ void reads(const Operands<N>& o, float (&read)[4][2]) const {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            float x = part == 0   ? reciprocal_approx(first[j])
                      : part == 1 ? reciprocal_approx(o.quarter[1][c + j])
                      : part == 2 ? 1.f
                                  : o.quarter[2][c + j];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                read[i][j] = x;
                x *= decay[i][j];
            }
        }
    }

    // write[i]: the decays between token t + i's write of the state and the chunk's middle; their reciprocal after
    // the middle.
    __device__ __forceinline__ void writes(const Operands<N>& o, float (&write)[4][2]) const {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            float x = part == 3   ? reciprocal_approx(second[j])
                      : part == 2 ? reciprocal_approx(o.quarter[2][c + j])
                      : part == 1 ? 1.f
                                  : o.quarter[1][c + j];
            #pragma unroll
            for (int i = 3; i >= 0; i--) {
                write[i][j] = x;
                x *= decay[i][j];
            }
        }
    }

    // middle = x factor, and outer = x factor half.
    __device__ __forceinline__ void scale(const typename Shape<N>::Rows& x, const float (&factor)[4][2],
                                          const float (&half)[2], typename Shape<N>::Rows& middle,
                                          typename Shape<N>::Rows& outer) const {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t pair = *(const uint32_t*)&x[t + i][c];
            const float x0 = low_half(pair) * factor[i][0], x1 = high_half(pair) * factor[i][1];
            *(uint32_t*)&middle[t + i][c] = pack_bf16(x0, x1);
            *(uint32_t*)&outer[t + i][c] = pack_bf16(x0 * half[0], x1 * half[1]);
        }
    }

    // Keeps factor[i][j] where the epilogue finds it: at [t + i][c + j].
    __device__ __forceinline__ void keep(const float (&factor)[4][2], float (*out)[N + 4]) const {
        #pragma unroll
        for (int i = 0; i < 4; i++) *(float2*)&out[t + i][c] = float2{factor[i][0], factor[i][1]};
    }
};

// The dot product of eight elements of two rows, each product scaled by `factor` where there is one, summed over the
// N / 8 threads that share the rows.
template <int N>
__device__ __forceinline__ float row_dot(const bf16* x, const bf16* y, const float* factor) {
    float sum = 0.f;
    #pragma unroll
    for (int i = 0; i < 8; i++) sum += to_float(x[i]) * to_float(y[i]) * (factor ? factor[i] : 1.f);
    #pragma unroll
    for (int lanes = 1; lanes < N / 8; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    return sum;
}

// A chunk's (16, 16) scores with everything but row > column set to zero, and the diagonal to `bonus`.
__device__ __forceinline__ void mask_below(Accumulator& scores, const float* bonus, bool flipped) {
    const int lane = lane_id();
    #pragma unroll
    for (int e = 0; e < 8; e++) {
        const int row = tile_row(lane, e), column = tile_column(lane, e);
        const bool keep = flipped ? column > row : row > column;
        scores.c[e] = keep ? scores.c[e] : row == column && bonus ? bonus[row] : 0.f;
    }
}

// The state (K, V) of a head in global memory to a warp's 16 rows of accumulators, and back: rows v0 + 0..15 of Sᵀ
// (columns k) where `transposed`, else rows k0 + 0..15 of S (columns v). A null source is zeros.
template <int N>
__device__ __forceinline__ void load_state(Accumulator (&S)[N / 16], const float* source, int row0, bool transposed) {
    const int lane = lane_id();
    #pragma unroll
    for (int b = 0; b < N / 16; b++)
        #pragma unroll
        for (int e = 0; e < 8; e++) {
            const int row = row0 + tile_row(lane, e), column = b * 16 + tile_column(lane, e);
            S[b].c[e] = !source ? 0.f : transposed ? source[column * N + row] : source[row * N + column];
        }
}
template <int N>
__device__ __forceinline__ void store_state(float* target, const Accumulator (&S)[N / 16], int row0, bool transposed) {
    const int lane = lane_id();
    #pragma unroll
    for (int b = 0; b < N / 16; b++)
        #pragma unroll
        for (int e = 0; e < 8; e++) {
            const int row = row0 + tile_row(lane, e), column = b * 16 + tile_column(lane, e);
            target[transposed ? column * N + row : row * N + column] = S[b].c[e];
        }
}
