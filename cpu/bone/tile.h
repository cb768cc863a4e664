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
    Rows from(int64_t t, int64_t c) const { return {(*this)[t] + c, stride}; }
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

// Some rows of a shard as Math multiplies them: where they lie, or in `tile`.
template <class Math, class E>
Rows<const typename Math::Operand> operands(typename Math::Operand* tile, Rows<const E> from, int64_t count,
                                            int64_t rank) {
    if constexpr (std::is_same<E, typename Math::Operand>::value)
        if (Math::reads_in_place(rank, from.stride)) return from;
    load_tile<Math, E>(tile, from, count, rank);
    return {tile, Math::width(rank)};
}

// Adds up short sums, which lose less than one long sum: total (width, width) becomes or grows by sum, which is
// cleared. The last goes to `to` (rank, rank), rounded once.
template <class Math, class E>
void add_sum(E* to, float* total, float* sum, int64_t rank, bool is_first, bool is_last) {
    const int64_t width = Math::width(rank);
    for (int64_t i = 0; i < rank; i++)
        for (int64_t c = 0; c < rank; c += kLanes) {
            const int64_t at = i * width + c;
            const Vec all = is_first ? load(sum + at) : load(total + at) + load(sum + at);
            if (is_last)
                store_some(to + i * rank + c, all, rank - c);
            else
                store(total + at, all);
        }
    std::fill(sum, sum + width * width, 0.0f);
}

}  // namespace
