// Helpers of Bone's kernels: rows of tensors, and tiles of a few of them in the kernels' own memory.
#pragma once
#include <algorithm>
#include <type_traits>

#include "common/vectors.h"

namespace {

constexpr int64_t kShortSum = 8;    // tiles whose products are added up in one sum
constexpr int64_t kChunkTiles = 4;  // tiles of rows that stay in the second-level cache

template <class E>
struct Rows {  // (count, width), `stride` elements apart
    E* data;
    int64_t stride;
    E* operator[](int64_t t) const { return data + t * stride; }
};

// Some rows of a shard become a tile padded with zeros.
template <class Math, class E>
void load_tile(typename Math::Operand* tile, Rows<const E> from, int64_t count, int64_t rank) {
    const int64_t width = Math::width(rank);
    for (int64_t t = 0; t < count; t++) {
        const E* row = from[t];
        if constexpr (std::is_same<E, typename Math::Operand>::value) {
            constexpr int64_t kLine = 64 / sizeof(E);
            int64_t c = 0;
            for (; c + kLine <= rank; c += kLine) memcpy(tile + t * width + c, row + c, 64);
            memcpy(tile + t * width + c, row + c, (rank - c) * sizeof(E));
            std::fill(tile + t * width + rank, tile + (t + 1) * width, E{});
        } else {
            for (int64_t c = 0; c < width; c += kLanes)
                store(tile + t * width + c, c < rank ? load_some(row + c, rank - c) : Vec{});
        }
    }
}

// Zero rows up to a whole number of Math's blocks, which `outer` sums over.
template <class Math>
void clear_rest(typename Math::Operand* tile, int64_t count, int64_t rank) {
    const int64_t width = Math::width(rank);
    std::fill(tile + count * width, tile + Math::kTile * width, typename Math::Operand{});
}

// total (rank, rank) += sum, which is cleared. Short sums added up lose less than one long sum.
template <class Math>
void add_sum(float* total, float* sum, int64_t rank) {
    const int64_t width = Math::width(rank);
    for (int64_t i = 0; i < rank; i++)
        for (int64_t c = 0; c < rank; c += kLanes) {
            float* to = total + i * rank + c;
            store_some(to, load_some(to, rank - c) + load(sum + i * width + c), rank - c);
        }
    std::fill(sum, sum + width * width, 0.0f);
}

}  // namespace
