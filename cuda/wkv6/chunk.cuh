// Shared by the two kernels: a chunk of 16 tokens in shared memory, and its decays. The head comment of wkv6.cu
// explains the names.
#pragma once
#include "common/chunk.cuh"
#include "wkv6/arguments.cuh"

constexpr int CHUNKS = SEGMENT / CHUNK;

// A step's decay is taken as 2^-x with x at most this, so that eight of them, and the reciprocal of their product,
// stay well inside bf16's range. A decay below 2^-14 leaves nothing that bf16 could show anyway.
constexpr float DECAY_CAP = 14.0f;
constexpr float LN_2 = 0.6931471805599453f;

// Products of a chunk's decays.
struct Products {
    Pair quarter[4][N / 2];               // of tokens 0-3, 4-7, 8-11, 12-15
    float first[N], second[N], whole[N];  // of tokens 0-7, 8-15, 0-15
};

// The operands made of one chunk; element (t, c) as the head comment of wkv6.cu defines them.
struct Operands : Products {
    Shape::Rows r_start, r_middle, k_middle, k_end;
    float bonus[CHUNK];  // sum over c of r u k
};

// log2 of a decay's reciprocal, from the raw w. A NaN stays one.
__device__ __forceinline__ float log2_decay(float w) {
    const float x = exp2_approx(w * LOG2_E) * LOG2_E;
    return x > DECAY_CAP ? DECAY_CAP : x;
}

// A thread's share of a chunk's decays: channels c and c + 1, four tokens from t.
struct Decays {
    int c, t, part;
    Pair decay[4], quarter[4], first, second;

    // Reads w and writes the products of the quarters.
    __device__ __forceinline__ Decays(const Shape::Rows& w, int valid, Products& o) {
        c = threadIdx.x % (N / 2) * 2;
        part = threadIdx.x / (N / 2);
        t = part * 4;
        Pair product = {{1.f, 1.f}};
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t pair = *(const uint32_t*)&w[t + i][c];
            decay[i].x[0] = t + i < valid ? exp2_approx(-log2_decay(low_half(pair))) : 1.f;
            decay[i].x[1] = t + i < valid ? exp2_approx(-log2_decay(high_half(pair))) : 1.f;
            product.x[0] *= decay[i].x[0];
            product.x[1] *= decay[i].x[1];
        }
        o.quarter[part][c / 2] = product;
    }

    // Computes the halves' products from the quarters, which all threads must have written, and shares them.
    __device__ __forceinline__ void halves(Products& o) {
        #pragma unroll
        for (int i = 0; i < 4; i++) quarter[i] = o.quarter[i][c / 2];
        Pair whole;
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            first.x[j] = quarter[0].x[j] * quarter[1].x[j];
            second.x[j] = quarter[2].x[j] * quarter[3].x[j];
            whole.x[j] = first.x[j] * second.x[j];
        }
        if (part != 0) return;
        *(Pair*)&o.first[c] = first;
        *(Pair*)&o.second[c] = second;
        *(Pair*)&o.whole[c] = whole;
    }

    // out[i] of channel c + j: x times the decays of the thread's tokens before its i-th.
    __device__ __forceinline__ void onwards(Pair (&out)[4], int j, float x) const {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i].x[j] = x;
            x *= decay[i].x[j];
        }
    }

    // The same with the decays of those after it.
    __device__ __forceinline__ void backwards(Pair (&out)[4], int j, float x) const {
        #pragma unroll
        for (int i = 3; i >= 0; i--) {
            out[i].x[j] = x;
            x *= decay[i].x[j];
        }
    }

    // The factors below take one reciprocal in every part, so that no thread branches.

    // read[i]: the decays between the chunk's middle and token t + i's read of the state; their reciprocal before
    // the middle.
    __device__ __forceinline__ void reads(Pair (&read)[4]) const {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            const float before = reciprocal_approx(part == 0 ? first.x[j] : quarter[1].x[j]);
            onwards(read, j, part < 2 ? before : part == 2 ? 1.f : quarter[2].x[j]);
        }
    }

    // write[i]: the decays between token t + i's write of the state and the chunk's middle; their reciprocal after
    // the middle.
    __device__ __forceinline__ void writes(Pair (&write)[4]) const {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            const float after = reciprocal_approx(part == 3 ? second.x[j] : quarter[2].x[j]);
            backwards(write, j, part > 1 ? after : part == 1 ? 1.f : quarter[1].x[j]);
        }
    }

    // start[i]: the decays between the chunk's start and token t + i's read of the state.
    __device__ __forceinline__ void starts(Pair (&start)[4]) const {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            const float x = part == 0   ? 1.f
                            : part == 1 ? quarter[0].x[j]
                            : part == 2 ? first.x[j]
                                        : first.x[j] * quarter[2].x[j];
            onwards(start, j, x);
        }
    }

    // end[i]: the decays between token t + i's write of the state and the chunk's end.
    __device__ __forceinline__ void ends(Pair (&end)[4]) const {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            const float x = part == 3   ? 1.f
                            : part == 2 ? quarter[3].x[j]
                            : part == 1 ? second.x[j]
                                        : second.x[j] * quarter[1].x[j];
            backwards(end, j, x);
        }
    }

    // out = x factor.
    __device__ __forceinline__ void scale(const Shape::Rows& x, const Pair (&factor)[4], Shape::Rows& out) const {
        uint32_t pair[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) pair[i] = *(const uint32_t*)&x[t + i][c];
        #pragma unroll
        for (int i = 0; i < 4; i++)
            *(uint32_t*)&out[t + i][c] =
                pack_bf16(low_half(pair[i]) * factor[i].x[0], high_half(pair[i]) * factor[i].x[1]);
    }

    // middle = x factor, and outer = x factor half.
    __device__ __forceinline__ void scale(const Shape::Rows& x, const Pair (&factor)[4], const Pair& half,
                                          Shape::Rows& middle, Shape::Rows& outer) const {
        uint32_t pair[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) pair[i] = *(const uint32_t*)&x[t + i][c];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const float x0 = low_half(pair[i]) * factor[i].x[0], x1 = high_half(pair[i]) * factor[i].x[1];
            *(uint32_t*)&middle[t + i][c] = pack_bf16(x0, x1);
            *(uint32_t*)&outer[t + i][c] = pack_bf16(x0 * half.x[0], x1 * half.x[1]);
        }
    }

    // Stores the factors for the epilogue at [t + i][c + j].
    __device__ __forceinline__ void keep(const Pair (&factor)[4], float (*out)[N + 4]) const {
        #pragma unroll
        for (int i = 0; i < 4; i++) *(Pair*)&out[t + i][c] = factor[i];
    }
};

// The state before token t of a block, as the kernels store it: in bf16, tile by tile of S, (K / 16, V / 16),
// each spread over a warp's lanes.
struct Checkpoint {
    Tile* tiles;  // the lane's share of the first

    __device__ __forceinline__ Checkpoint(const Arguments& a, const Sequence& s, int t)
        : tiles((Tile*)((bf16*)a.checkpoints + s.checkpoint + t / SEGMENT * s.checkpoint_stride) + lane_id()) {}
    __device__ __forceinline__ Tile& operator()(int k, int v) const { return tiles[(k * (N / 16) + v) * 32]; }
};

// Sum over the N / 8 threads that share a row.
__device__ __forceinline__ float row_sum(float x) {
    #pragma unroll
    for (int lanes = 1; lanes < N / 8; lanes *= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

// The dot product of eight elements of two rows, 16-byte aligned, each product scaled by `factor` if SCALED, summed
// over the threads that share the rows.
template <bool SCALED>
__device__ __forceinline__ float row_dot(const Tile& a, const Tile& b, const float* factor = nullptr) {
    float sum = 0.f;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const float low = low_half(a.x[i]) * low_half(b.x[i]), high = high_half(a.x[i]) * high_half(b.x[i]);
        sum += SCALED ? low * factor[2 * i] : low;
        sum += SCALED ? high * factor[2 * i + 1] : high;
    }
    return row_sum(sum);
}

// Sets a chunk's (16, 16) scores to zero except below the diagonal (above it if `above`), and the diagonal to
// `diagonal` if there is one.
__device__ __forceinline__ void mask(Accumulator& scores, bool above, const float* diagonal) {
    const int lane = lane_id();
    float own[2] = {0.f, 0.f};  // the diagonal's elements in the lane's two rows, read without a branch
    #pragma unroll
    for (int half = 0; half < 2; half++)
        if (diagonal) own[half] = diagonal[lane / 4 + half * 8];
    #pragma unroll
    for (int e = 0; e < 8; e++) {
        const int row = tile_row(lane, e), column = tile_column(lane, e);
        const bool keep = above ? column > row : row > column;
        scores.c[e] = keep ? scores.c[e] : row == column ? own[e / 2 % 2] : 0.f;
    }
}
