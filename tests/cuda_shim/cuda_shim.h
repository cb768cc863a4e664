// CUDA on a CPU, as far as the kernels need it: what common/ptx.cuh and CUDA itself provide, in plain C++.
//
//     g++ -std=c++17 -fPIC -shared -pthread -fno-strict-aliasing -I tests/cuda_shim -I cuda -x c++ cuda/wkv6/wkv6.cu
//
// Shows wrong results, missing barriers (under several orders of the threads) and missing waits for asynchronous
// copies (a copy happens when it is waited for, and not before). Does not show bank conflicts, speed, or faults that
// depend on the memory model.
#pragma once
#include <cmath>
#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define threadIdx (shim::block().fiber().thread)
#define blockIdx (shim::block().index)
#define blockDim (shim::block().shape)
#define gridDim (shim::block().grid)
#define __syncthreads() shim::block_barrier()

using std::max;
using std::min;

struct bf16 { unsigned short bits; };

inline float __uint_as_float(uint32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t y;
    std::memcpy(&y, &x, 4);
    return y;
}

// Denormal results are zero, as with .ftz.
inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
inline float exp2_approx(float x) { return flushed(std::exp2(x)); }
inline float reciprocal_approx(float x) { return flushed(1.f / x); }

inline uint32_t round_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }

inline char* dynamic_shared() { return shim::block().dynamic; }

inline void cp_async_16(void* shared, const void* global, bool valid) {
    shim::block().fiber().copies.push_back({shared, valid ? global : nullptr, 16});
}
inline void cp_async_wait_all() {
    auto& copies = shim::block().fiber().copies;
    for (const auto& copy : copies)
        copy.source ? (void)std::memcpy(copy.target, copy.source, copy.bytes)
                    : (void)std::memset(copy.target, 0, copy.bytes);
    copies.clear();
}

// What another lane gives: number `other`, or where XOR is, the own number with these bits turned.
template <bool XOR>
inline float shuffled(float x, int other) {
    struct Data {
        float in, out;
        int other;
    } data{x, 0.f, other};
    shim::warp_operation<Data>(data, [](Data* const* lanes, unsigned count) {
        for (unsigned i = 0; i < count; i++) lanes[i]->out = lanes[((XOR ? i : 0) ^ lanes[i]->other) % count]->in;
    });
    return data.out;
}
inline float __shfl_sync(unsigned, float x, int lane) { return shuffled<false>(x, lane); }
inline float __shfl_xor_sync(unsigned, float x, int mask) { return shuffled<true>(x, mask); }

inline void __syncwarp() {
    char nothing = 0;
    shim::warp_operation<char>(nothing, [](char* const*, unsigned) {});
}

namespace shim {

// Element (row, column) of an 8x8 bf16 matrix held one pair a lane.
inline unsigned short element(const uint32_t* const* lanes, int row, int column) {
    return (unsigned short)(*lanes[row * 4 + column / 2] >> column % 2 * 16);
}

struct MatrixLoad {
    uint32_t* out;
    const unsigned short* row;
};
template <bool TRANSPOSE>
void load_matrices(MatrixLoad* const* lanes, unsigned) {
    for (int lane = 0; lane < 32; lane++)
        for (int m = 0; m < 4; m++) {
            const auto at = [&](int row, int column) -> uint32_t { return lanes[m * 8 + row]->row[column]; };
            const int i = lane / 4, j = lane % 4 * 2;
            lanes[lane]->out[m] = TRANSPOSE ? at(j, i) | at(j + 1, i) << 16 : at(i, j) | at(i, j + 1) << 16;
        }
}

struct Product {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};
inline void multiply_fragments(Product* const* lanes, unsigned) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++)
        for (int half = 0; half < 2; half++) {
            const int row = lane / 4, column = lane % 4 * 2 + half;
            const auto value = [&](uint32_t x) { return __uint_as_float(half ? x & 0xffff0000u : x << 16); };
            a[row][column] = value(lanes[lane]->a[0]);
            a[row + 8][column] = value(lanes[lane]->a[1]);
            a[row][column + 8] = value(lanes[lane]->a[2]);
            a[row + 8][column + 8] = value(lanes[lane]->a[3]);
            b[column][row] = value(lanes[lane]->b[0]);
            b[column + 8][row] = value(lanes[lane]->b[1]);
        }
    float d[16][8] = {};
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; lane++)
        for (int e = 0; e < 4; e++) lanes[lane]->d[e] += d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
}

}  // namespace shim

inline void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
    shim::Product data{d, a, {b0, b1}};
    shim::warp_operation<shim::Product>(data, shim::multiply_fragments);
}
inline void ldmatrix_x4(uint32_t* x, const void* row) {
    shim::MatrixLoad data{x, (const unsigned short*)row};
    shim::warp_operation<shim::MatrixLoad>(data, shim::load_matrices<false>);
}
inline void ldmatrix_x4_trans(uint32_t* x, const void* row) {
    shim::MatrixLoad data{x, (const unsigned short*)row};
    shim::warp_operation<shim::MatrixLoad>(data, shim::load_matrices<true>);
}
inline uint32_t movmatrix_trans(uint32_t x) {
    struct Data { uint32_t in, out; } data{x, 0};
    shim::warp_operation<Data>(data, [](Data* const* lanes, unsigned) {
        const uint32_t* in[32];
        for (int lane = 0; lane < 32; lane++) in[lane] = &lanes[lane]->in;
        for (int lane = 0; lane < 32; lane++) {
            const int i = lane / 4, j = lane % 4 * 2;
            lanes[lane]->out = shim::element(in, j, i) | (uint32_t)shim::element(in, j + 1, i) << 16;
        }
    });
    return data.out;
}

// A kernel's launch: NAME_run(arguments, blocks) runs it over so many blocks.
#define KERNEL_LAUNCH(Arguments, name, threads, shared)                                \
    extern "C" {                                                                       \
    extern const int name##_threads;                                                   \
    const int name##_threads = (int)(threads);                                         \
    void name##_run(const Arguments* a, int blocks) {                                  \
        shim::run_grid(dim3(blocks), dim3(threads), (int)(shared), [&] { name(*a); }); \
    }                                                                                  \
    }

// Chooses the order in which the threads of a block take turns: a shim::Order.
extern "C" void shim_set_order(int order) { shim::order() = order; }
