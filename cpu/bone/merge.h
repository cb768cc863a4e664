// bat-out's weight: for each block a of output rows and b of input columns, w_ab + w_ab B_a + B_a.
#pragma once
#include "bone/tile.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace {

// w, merged (count * rank, in), bone (count, rank, rank): merged = w + w B + B for each block of rows and columns.
// If d_bone (float, zeros) is not null, merged holds its own gradient at first, from which that of bone is computed
// before it is overwritten. The blocks of one a share a matrix: in memory's order their rows are one matrix
// (rank * in / rank, rank).
template <class Math, class E>
void merge(const E* w, const E* bone, E* merged, float* d_bone, int64_t count, int64_t in, int64_t rank, int threads) {
    using Operand = typename Math::Operand;
    const int64_t blocks = in / rank, pieces = rank * blocks, width = Math::width(rank);
    const int wanted = useful(threads, count, count * rank * in);
#pragma omp parallel num_threads(wanted)
    {
        Math math(rank);
        Scratch<Operand> packed(Math::packed_size(rank)), tile(Math::kTile * width), d(Math::kTile * width);
        Scratch<float> product(Math::kTile * width), sum(width * width);
        std::fill(sum.data(), sum.data() + width * width, 0.0f);
        const Range mine = share(count, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t a = mine.begin; a < mine.end; a++) {
            const E* matrix = bone + a * rank * rank;
            Math::pack(packed.data(), matrix, rank);
            for (int64_t first = 0; first < pieces; first += Math::kTile) {
                const int64_t size = std::min(Math::kTile, pieces - first);
                const E* from = w + (a * pieces + first) * rank;
                E* to = merged + (a * pieces + first) * rank;
                load_tile<Math, E>(tile.data(), {from, rank}, size, rank);
                if (d_bone) {
                    load_tile<Math, E>(d.data(), {to, rank}, size, rank);
                    clear_rest<Math>(tile.data(), size, rank);
                    clear_rest<Math>(d.data(), size, rank);
                    math.outer(sum.data(), tile.data(), d.data(), size);
                    for (int64_t t = 0, end; t < size; t = end) {  // as many as lie in one row
                        const int64_t row = (first + t) / blocks;
                        end = std::min(size, (row + 1) * blocks - first);
                        for (int64_t c = 0; c < width; c += kLanes) {
                            Vec own = load(sum.data() + row * width + c);
                            for (int64_t i = t; i < end; i++) own += load(d.data() + i * width + c);
                            store(sum.data() + row * width + c, own);
                        }
                    }
                    if ((first / Math::kTile) % kShortSum == kShortSum - 1 || first + size == pieces)
                        add_sum<Math>(d_bone + a * rank * rank, sum.data(), rank);
                }
                math.rows(product.data(), tile.data(), packed.data(), size, [&](int64_t begin, int64_t end) {
                    for (int64_t t = begin; t < end; t++) {
                        const E* row = matrix + (first + t) / blocks * rank;
                        for (int64_t c = 0; c < rank; c += kLanes) {
                            const int64_t i = t * width + c;
                            const Vec affine =
                                load(tile.data() + i) + load(product.data() + i) + load_some(row + c, rank - c);
                            store_some(to + t * rank + c, affine, rank - c);
                        }
                    }
                });
            }
        }
    }
}

}  // namespace
