// Stands in for the matrix unit where a processor has none: cpu/bone/amx.h, compiled with this header before it, runs
// on tile registers that are plain arrays of the thread. Everything else is the same source and the same AVX-512
// instructions.
//
// A register starts as poison (NaN), as it does again after _tile_release, so that a result which depends on a missing
// load or on registers that were not configured is no number.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace amx_shim {

constexpr int kRegisters = 8, kRows = 16, kBytes = 64;

struct Tiles {
    bool configured = false;
    alignas(64) char data[kRegisters][kRows][kBytes];
    Tiles() { poison(); }
    void poison() { memset(data, 0xff, sizeof data); }
};
inline Tiles& tiles() {
    static thread_local Tiles own;
    return own;
}

// The shapes that the kernels configure are the registers' largest; others would need their sizes kept here.
inline void configure(const void* config) {
    const uint8_t* bytes = static_cast<const uint8_t*>(config);
    bool whole = bytes[0] == 1;
    for (int i = 0; i < kRegisters; i++) {
        uint16_t row;
        memcpy(&row, bytes + 16 + 2 * i, 2);
        whole = whole && row == kBytes && bytes[48 + i] == kRows;
    }
    tiles().configured = whole;
    tiles().poison();
}
inline void release() {
    tiles().configured = false;
    tiles().poison();
}
inline void load(int to, const void* from, int64_t stride) {
    if (!tiles().configured) return tiles().poison();
    for (int i = 0; i < kRows; i++) memcpy(tiles().data[to][i], static_cast<const char*>(from) + i * stride, kBytes);
}
inline void store(int from, void* to, int64_t stride) {
    for (int i = 0; i < kRows; i++) memcpy(static_cast<char*>(to) + i * stride, tiles().data[from][i], kBytes);
}
inline void zero(int tile) {
    if (!tiles().configured) return tiles().poison();
    memset(tiles().data[tile], 0, sizeof tiles().data[tile]);
}

// sum (16, 16) += left (16, 32) right (32, 16), right's rows interleaved in pairs.
inline void multiply(int sum, int left, int right) {
    const auto number = [](const char* at) {
        uint16_t half;
        memcpy(&half, at, 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    };
    for (int m = 0; m < kRows; m++)
        for (int n = 0; n < kRows; n++) {
            float total;
            memcpy(&total, &tiles().data[sum][m][4 * n], 4);
            for (int k = 0; k < kRows; k++)
                for (int half = 0; half < 2; half++)
                    total += number(&tiles().data[left][m][4 * k + 2 * half]) *
                             number(&tiles().data[right][k][4 * n + 2 * half]);
            memcpy(&tiles().data[sum][m][4 * n], &total, 4);
        }
}

}  // namespace amx_shim

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_shim::configure
#define _tile_release amx_shim::release
#define _tile_loadd amx_shim::load
#define _tile_stored amx_shim::store
#define _tile_zero amx_shim::zero
#define _tile_dpbf16ps amx_shim::multiply

// Whether this processor has the other instructions that amx.h uses.
extern "C" inline __attribute__((used)) int amx_shim_runs() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512bf16");
}
