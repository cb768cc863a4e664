// Products of a few rows with a matrix in blocks, and the matrix itself: 32 weights along a row share a scale, and are
// integers of 8 or 4 bits.
//
// The unit of work is a quad: the words of four rows, side by side in memory, each of 32 / BITS columns. A quad is one
// load of 16 bytes, and neighbouring threads take neighbouring quads.
#pragma once
#include "common/vector.cuh"
#include "decode/arguments.cuh"

constexpr int PANEL = 16;  // rows of a matrix that stand side by side
constexpr int QUADS = PANEL / 4;
constexpr int SCALES = PANEL / 8;  // the quads that a block's scales take the place of
constexpr int DEQUANTIZE_THREADS = 256;
template <int ROWS>
constexpr int PRODUCT_THREADS = ROWS == 1 ? 512 : 256;  // more rows need more registers
template <int BITS>
constexpr int MOVED = 32 / BITS < WIDEST ? 32 / BITS : WIDEST;  // elements of a word's columns at once

struct alignas(16) Words { uint32_t x[4]; };

template <int BITS>
struct Quad {
    static constexpr int COLUMNS = 32 / BITS;
    float x[4][COLUMNS];  // as integers
    float scales[4];

    // Quad number `at` of a matrix.
    __device__ __forceinline__ Quad(const DecodeArguments& a, index_t at) {
        constexpr int HERE = BITS * QUADS;  // quads of a block, which its scales follow
        const Words* block = (const Words*)a.words + at / HERE * (HERE + SCALES);
        const Words words = block[at % HERE];
        load_vector<4>(scales, (const bf16*)(block + HERE) + at % QUADS * 4);
        #pragma unroll
        for (int r = 0; r < 4; r++)
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) {  // four columns in bytes, or in their halves
                const int lowest = c % 4 * 8 + c / 4 * BITS;
                x[r][c] = (float)((int)(words.x[r] >> lowest & ((1 << BITS) - 1)) - (1 << (BITS - 1)));
            }
    }
};

// y = x Wᵀ for at most ROWS rows x; a block of threads takes a panel of W.
template <int BITS, int ROWS>
__device__ void product(const DecodeArguments& a) {
    constexpr int THREADS = PRODUCT_THREADS<ROWS>, COLUMNS = Quad<BITS>::COLUMNS, V = MOVED<BITS>;
    __shared__ float parts[THREADS / 32][ROWS][PANEL];  // of the sums, by warps
    const index_t quads = a.in_features / COLUMNS * QUADS, first = blockIdx.x * quads;
    float sums[ROWS][4] = {};
    #pragma unroll(ROWS == 1 ? 4 : 1)
    for (index_t at = threadIdx.x; at < quads; at += THREADS) {
        const Quad<BITS> w(a, first + at);
        #pragma unroll
        for (int t = 0; t < ROWS; t++) {
            if (t >= a.rows) continue;
            const bf16* p = (const bf16*)a.x + t * a.in_features + at / QUADS * COLUMNS;
            float x[COLUMNS / V][V];
            #pragma unroll
            for (int i = 0; i < COLUMNS / V; i++) load_vector<V>(x[i], p + i * V);
            #pragma unroll
            for (int r = 0; r < 4; r++) {
                float sum = 0.f;
                #pragma unroll
                for (int c = 0; c < COLUMNS; c++) sum += w.x[r][c] * x[c / V][c % V];
                sums[t][r] += w.scales[r] * sum;
            }
        }
    }
    #pragma unroll
    for (int t = 0; t < ROWS; t++)
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            for (int lanes = QUADS; lanes < 32; lanes *= 2) sums[t][r] += __shfl_xor_sync(~0u, sums[t][r], lanes);
            if (lane_id() < QUADS) parts[threadIdx.x / 32][t][lane_id() * 4 + r] = sums[t][r];
        }
    __syncthreads();
    if ((int)threadIdx.x >= a.rows * PANEL) return;
    const int t = threadIdx.x / PANEL, r = threadIdx.x % PANEL;
    const index_t row = blockIdx.x * (index_t)PANEL + r;
    float sum = 0.f;
    #pragma unroll
    for (int warp = 0; warp < THREADS / 32; warp++) sum += parts[warp][t][r];
    if (row < a.out_features) store((bf16*)a.y + t * a.out_features + row, sum);
}

// The matrix (out, in) that the blocks stand for; a thread takes a quad.
template <int BITS>
__device__ void dequantize(const DecodeArguments& a) {
    constexpr int COLUMNS = Quad<BITS>::COLUMNS, V = MOVED<BITS>;
    const index_t at = blockIdx.x * (index_t)DEQUANTIZE_THREADS + threadIdx.x;
    const index_t quads = a.in_features / COLUMNS * QUADS, row = at / quads * PANEL + at % QUADS * 4;
    if (row >= a.out_features) return;
    const Quad<BITS> w(a, at);
    #pragma unroll
    for (int r = 0; r < 4; r++) {
        if (row + r >= a.out_features) return;
        bf16* p = (bf16*)a.y + (row + r) * a.in_features + at % quads / QUADS * COLUMNS;
        #pragma unroll
        for (int i = 0; i < COLUMNS; i += V) {
            float x[V];
            #pragma unroll
            for (int e = 0; e < V; e++) x[e] = w.scales[r] * w.x[r][i + e];
            store_vector<V>(p + i, x);
        }
    }
}
