// 16x16 tiles, the only shape that the kernels multiply.
//
// A warp holds a tile spread over its lanes. Lane l, with row g = l / 4 and column q = 2 (l % 4), holds the
// eight elements (row, column) =
//     0: (g, q)    1: (g, q+1)    2: (g+8, q)    3: (g+8, q+1)
//     4: (g, q+8)  5: (g, q+9)    6: (g+8, q+8)  7: (g+8, q+9)
// as floats in an Accumulator, or as bf16 pairs in a Tile. This is the layout of m16n8k16's result, of its first
// operand, and (rows read as columns) of its second one. So multiply() computes c += a bᵀ, and a result becomes an
// operand by rounding, without a shuffle or a trip to shared memory.
#pragma once
#include "common/device.cuh"

struct alignas(16) Tile { uint32_t x[4]; };
struct Accumulator { float c[8]; };
struct alignas(8) Pair { float x[2]; };  // two neighbours, loaded and stored at once

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int tile_row(int lane, int e) { return lane / 4 + (e & 2) * 4; }
__device__ __forceinline__ int tile_column(int lane, int e) { return lane % 4 * 2 + (e & 1) + (e & 4) * 2; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }
__device__ __forceinline__ void store(bf16* p, float x) { p->bits = (unsigned short)pack_bf16(x, 0.f); }
__device__ __forceinline__ float low_half(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_half(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

__device__ __forceinline__ Accumulator zeros() { return Accumulator{{0, 0, 0, 0, 0, 0, 0, 0}}; }

__device__ __forceinline__ void add(Accumulator& c, const Accumulator& d) {
    #pragma unroll
    for (int e = 0; e < 8; e++) c.c[e] += d.c[e];
}

__device__ __forceinline__ Tile rounded(const Accumulator& a) {
    return Tile{
        {pack_bf16(a.c[0], a.c[1]), pack_bf16(a.c[2], a.c[3]), pack_bf16(a.c[4], a.c[5]), pack_bf16(a.c[6], a.c[7])}};
}

__device__ __forceinline__ Accumulator widened(const Tile& t) {
    Accumulator a;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        a.c[2 * i] = low_half(t.x[i]);
        a.c[2 * i + 1] = high_half(t.x[i]);
    }
    return a;
}

// Eight neighbours in memory, 16-byte aligned, as a tile's words.
__device__ __forceinline__ Tile load_eight(const bf16* p) { return *(const Tile*)p; }
__device__ __forceinline__ void store_eight(bf16* p, const Tile& x) { *(Tile*)p = x; }

// A tile as a product's second operand: in the order in which the instruction takes the registers, so that no register
// has to be moved.
struct Right { uint32_t x[4]; };

__device__ __forceinline__ Right right(const Accumulator& a) {
    return Right{
        {pack_bf16(a.c[0], a.c[1]), pack_bf16(a.c[4], a.c[5]), pack_bf16(a.c[2], a.c[3]), pack_bf16(a.c[6], a.c[7])}};
}
__device__ __forceinline__ Right right(const Tile& t) { return Right{{t.x[0], t.x[2], t.x[1], t.x[3]}}; }

// c += a bᵀ
__device__ __forceinline__ void multiply(Accumulator& c, const Tile& a, const Right& b) {
    mma_m16n8k16(c.c, a.x, b.x[0], b.x[1]);
    mma_m16n8k16(c.c + 4, a.x, b.x[2], b.x[3]);
}
__device__ __forceinline__ void multiply(Accumulator& c, const Tile& a, const Tile& b) {
    mma_m16n8k16(c.c, a.x, b.x[0], b.x[2]);
    mma_m16n8k16(c.c + 4, a.x, b.x[1], b.x[3]);
}

__device__ __forceinline__ Tile transposed(const Tile& t) {
    return Tile{{movmatrix_trans(t.x[0]), movmatrix_trans(t.x[2]), movmatrix_trans(t.x[1]), movmatrix_trans(t.x[3])}};
}

// The tile whose element (i, j) is p[i * stride + j], in shared memory.
__device__ __forceinline__ Tile load_tile(const bf16* p, int stride) {
    const int lane = lane_id();
    Tile t;
    ldmatrix_x4(t.x, p + lane % 16 * stride + lane / 16 * 8);
    return t;
}

// The tile whose element (i, j) is p[j * stride + i], in shared memory.
__device__ __forceinline__ Tile load_transposed(const bf16* p, int stride) {
    const int lane = lane_id();
    Tile t;
    ldmatrix_x4_trans(t.x, p + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    return t;
}

// The same two for second operands.
__device__ __forceinline__ Right load_right(const bf16* p, int stride) {
    const int lane = lane_id();
    Right t;
    ldmatrix_x4(t.x, p + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8);
    return t;
}
__device__ __forceinline__ Right load_right_transposed(const bf16* p, int stride) {
    const int lane = lane_id();
    Right t;
    ldmatrix_x4_trans(t.x, p + lane % 16 * stride + lane / 16 * 8);
    return t;
}

// Writes the tile's first `rows` rows to p[i * stride + j], in global memory.
__device__ __forceinline__ void store_tile(bf16* p, index_t stride, int rows, const Tile& t) {
    const int lane = lane_id(), row = lane / 4;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = row + (i & 1) * 8;
        if (r < rows) *(uint32_t*)(p + r * stride + lane % 4 * 2 + (i & 2) * 4) = t.x[i];
    }
}

// Scales the columns of c by factor[0..15].
__device__ __forceinline__ void scale_columns(Accumulator& c, const float* factor) {
    const int column = lane_id() % 4 * 2;
    const Pair left = *(const Pair*)&factor[column], right = *(const Pair*)&factor[column + 8];
    #pragma unroll
    for (int e = 0; e < 4; e++) {
        c.c[e] *= left.x[e & 1];
        c.c[e + 4] *= right.x[e & 1];
    }
}

// Scales the rows of c by factor[0..15].
__device__ __forceinline__ void scale_rows(Accumulator& c, const float* factor) {
    const float upper = factor[lane_id() / 4], lower = factor[lane_id() / 4 + 8];
    #pragma unroll
    for (int e = 0; e < 8; e++) c.c[e] *= e & 2 ? lower : upper;
}

// Sum over the four lanes that share a tile's rows.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
