// bat-out's weight: for each block a of output rows and b of input columns, w_ab + w_ab B_a + B_a.
#pragma once
#include "bone/tile.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace {

// w, merged (count * rank, in), bone (count, rank, rank): merged = w + w B + B for each block of rows and columns.
// If d_bone is not null, merged holds its own gradient at first; that of bone is computed from it before it is
// overwritten. The blocks of one a share a matrix: their rows are one matrix (rank * in / rank, rank) in memory's
// order.
template <class Math, class E>
void merge(const E* w, const E* bone, E* merged, E* d_bone, int64_t count, int64_t in, int64_t rank, int threads) {
    using Operand = typename Math::Operand;
    const int64_t blocks = in / rank, pieces = rank * blocks, width = Math::width(rank);
    const int wanted = useful(threads, count, count * rank * in);
#pragma omp parallel num_threads(wanted)
    {
        Math math(rank);
        Scratch<Operand> packed(Math::packed_size(rank)), tile(Math::kTile * width), d(Math::kTile * width);
        Scratch<float> sum(width * width), total(width * width);
        std::fill(sum.data(), sum.data() + width * width, 0.0f);
        const Range mine = share(count, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t a = mine.begin; a < mine.end; a++) {
            const E* matrix = bone + a * rank * rank;
            Math::pack(packed.data(), matrix, rank);
            for (int64_t first = 0; first < pieces; first += Math::kTile) {
                const int64_t size = std::min(Math::kTile, pieces - first);
                const E* from = w + (a * pieces + first) * rank;
                E* to = merged + (a * pieces + first) * rank;
                const auto left = operands<Math, E>(tile.data(), {from, rank}, size, rank);
                if (d_bone) {
                    const auto right = operands<Math, E>(d.data(), {to, rank}, size, rank);
                    math.outer(sum.data(), left, right, size);
                    for (int64_t t = 0, end; t < size; t = end) {  // as many as lie in one row
                        const int64_t row = (first + t) / blocks;
                        end = std::min(size, (row + 1) * blocks - first);
                        for (int64_t c = 0; c < rank; c += kLanes) {
                            Vec row_sum = load(sum.data() + row * width + c);
                            for (int64_t i = t; i < end; i++) row_sum += load_some(right[i] + c, rank - c);
                            store(sum.data() + row * width + c, row_sum);
                        }
                    }
                    const int64_t tiles = first / Math::kTile + 1;
                    const bool is_last = first + size == pieces;
                    if (tiles % kShortSum == 0 || is_last)
                        add_sum<Math>(d_bone + a * rank * rank, total.data(), sum.data(), rank, tiles <= kShortSum,
                                      is_last);
                }
                math.rows(left, packed.data(), size, [=](int64_t t, int64_t c, Vec product) {
                    const E* row = matrix + (first + t) / blocks * rank;
                    const Vec affine = load_some(left[t] + c, rank - c) + product + load_some(row + c, rank - c);
                    store_some(to + t * rank + c, affine, rank - c);
                });
            }
        }
    }
}

}  // namespace
