// A chunk of 16 tokens in shared memory, and a head's state in registers, for the kernels of the recurrences.
#pragma once
#include "common/tile.cuh"

constexpr int CHUNK = 16;
constexpr int N = 64;  // head size, that of all released models
constexpr float LOG2_E = 1.4426950408889634f;

// A block has 2 N threads: warps of 16 rows for the matrix products, four tokens of two channels each for the decays,
// and one 16-byte copy each for a chunk of one tensor.
struct Shape {
    static constexpr int threads = 2 * N;
    static constexpr int tiles = N / 16;
    static constexpr int stride = N + 8;  // rows of a chunk, padded so that eight of them touch all banks once
    using Rows = bf16[CHUNK][stride];
};

// The eight elements of a chunk that a thread copies, neighbours in one row; `thread` is one of 2 N.
__device__ __forceinline__ bf16* own(Shape::Rows& rows, unsigned thread = threadIdx.x) {
    return &rows[thread / (N / 8)][thread % (N / 8) * 8];
}

// Starts the copy of them from `at` in a tensor; zeros if not `valid`.
__device__ __forceinline__ void fetch(Shape::Rows& rows, const void* tensor, index_t at, bool valid) {
    cp_async_16(own(rows), (const bf16*)tensor + (valid ? at : 0), valid);
}

// The same for the chunk that begins at token t0, zeros past the sequence's end.
template <class Sequence>
__device__ __forceinline__ void fetch(Shape::Rows& rows, const void* tensor, const Sequence& s, int t0,
                                      unsigned thread = threadIdx.x) {
    const int row = thread / (N / 8), column = thread % (N / 8) * 8;
    const bool valid = t0 + row < s.length;
    const bf16* source = (const bf16*)tensor + s.elements + (valid ? (t0 + row) * s.stride + column : 0);
    cp_async_16(own(rows, thread), source, valid);
}

// Loads a head's state from global memory into a warp's 16 rows of accumulators: rows row0 + 0..15 of S, or of Sᵀ if
// `transposed`. A null source is zeros.
__device__ __forceinline__ void load_state(Accumulator (&S)[N / 16], const float* source, int row0, bool transposed) {
    const int lane = lane_id();
    #pragma unroll
    for (int b = 0; b < N / 16; b++)
        #pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int row = row0 + tile_row(lane, e), column = b * 16 + tile_column(lane, e);
            Pair pair = {{0.f, 0.f}};
            if (source && transposed) pair = Pair{{source[column * N + row], source[(column + 1) * N + row]}};
            if (source && !transposed) pair = *(const Pair*)&source[row * N + column];
            S[b].c[e] = pair.x[0];
            S[b].c[e + 1] = pair.x[1];
        }
}

// Stores them.
__device__ __forceinline__ void store_state(float* target, const Accumulator (&S)[N / 16], int row0, bool transposed) {
    const int lane = lane_id();
    #pragma unroll
    for (int b = 0; b < N / 16; b++)
        #pragma unroll
        for (int e = 0; e < 8; e += 2) {
            const int row = row0 + tile_row(lane, e), column = b * 16 + tile_column(lane, e);
            if (transposed) {
                target[column * N + row] = S[b].c[e];
                target[(column + 1) * N + row] = S[b].c[e + 1];
            } else {
                *(Pair*)&target[row * N + column] = Pair{{S[b].c[e], S[b].c[e + 1]}};
            }
        }
}
