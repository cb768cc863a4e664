// Rows of a matrix on their way to shared memory.
#pragma once
#include "common/device.cuh"

constexpr int PADDING = 8;  // elements after a row, so that eight rows of 16 bytes touch all banks once

// Starts the copy of `rows` rows of COLUMNS elements, which lie `stride` apart, zeros past the first `valid` of them.
template <int COLUMNS>
__device__ __forceinline__ void fetch_rows(bf16 (*to)[COLUMNS + PADDING], const bf16* from, index_t stride, int rows,
                                           int valid) {
    #pragma unroll 1  // its addresses would take registers that products have a use for
    for (int i = threadIdx.x; i < rows * (COLUMNS / 8); i += blockDim.x) {
        const int row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
        cp_async_16(&to[row][column], from + (row < valid ? row * stride + column : 0), row < valid);
    }
}
