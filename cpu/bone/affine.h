// bat-in's products, with a matrix B_b for each shard x_b of the input:
//     forward   z_b = x_b + u_b, shift = sum_b u_b   u_b = x_b B_b^T
//     backward  dx_b = dz_b + du_b B_b, dB_b = du_b^T x_b   du_b = dz_b + sum_a g_a
#pragma once
#include "bone/shards.h"
#include "bone/tile.h"
#include "common/prefetch.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace {

// x (tokens, in), bone (in / rank, rank, rank), z (tokens, in), shift (tokens, rank).
template <class Math, class E>
void affine(Rows<const E> x, const E* bone, E* z, E* shift, int64_t tokens, int64_t in, int64_t rank, int threads) {
    using Operand = typename Math::Operand;
    const int64_t blocks = in / rank, width = Math::width(rank), size = Math::packed_size(rank);
    Scratch<Operand> packed(blocks * size);
    const int wanted = useful(threads, tokens, tokens * in);
#pragma omp parallel num_threads(wanted)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        const Range mine = share(blocks, thread, team);
        for (int64_t b = mine.begin; b < mine.end; b++)
            Math::pack_transposed(packed.data() + b * size, bone + b * rank * rank, rank);
#pragma omp barrier
        Math math(rank);
        Scratch<Operand> tile(Math::kTile * width);
        Scratch<float> sums(Math::kTile * width);
        const Range rows = share(tokens, thread, team);
        for (int64_t first = rows.begin; first < rows.end; first += Math::kTile) {
            const int64_t count = std::min(Math::kTile, rows.end - first);
            std::fill(sums.data(), sums.data() + count * width, 0.0f);
            for (int64_t b = 0; b < blocks; b++) {
                // what comes next: the same rows' next shard, or the next rows' first
                const bool is_last = b + 1 == blocks;
                const int64_t next_row = is_last ? first + Math::kTile : first, next = is_last ? 0 : (b + 1) * rank;
                const Rows<const E> x_next = x.from(next_row, next);
                const Rows<E> to{z + first * in + b * rank, in}, z_next{z + next_row * in + next, in};
                const auto left = operands<Math, E>(tile.data(), x.from(first, b * rank), count, rank);
                math.rows(left, packed.data() + b * size, count, [=, sum = sums.data()](int64_t t, int64_t c, Vec u) {
                    if (c == 0) {
                        fetch(x_next[t], rank);
                        fetch_to_write(z_next[t], rank);
                    }
                    store(sum + t * width + c, load(sum + t * width + c) + u);
                    store_some(to[t] + c, load_some(left[t] + c, rank - c) + u, rank - c);
                });
            }
            for (int64_t t = 0; t < count; t++)
                for (int64_t c = 0; c < rank; c += kLanes)
                    store_some(shift + (first + t) * rank + c, load(sums.data() + t * width + c), rank - c);
        }
    }
}

// d (tokens, in) holds dz and becomes dx. d_bone may be null, and x with it.
template <class Math, class E>
void affine_backward(E* d, Rows<const E> g, Rows<const E> x, const E* bone, E* d_bone, int64_t tokens, int64_t in,
                     int64_t out, int64_t rank, int threads) {
    using Operand = typename Math::Operand;
    const int64_t blocks = in / rank, width = Math::width(rank), chunk = kChunkTiles * Math::kTile;
    Scratch<float> shift(chunk * width);  // of one chunk's tokens
    std::fill(shift.data(), shift.data() + chunk * width, 0.0f);
    Scratch<float> totals(d_bone && tokens > chunk ? blocks * width * width : 0);
    const int wanted = useful(threads, blocks, tokens * in);
#pragma omp parallel num_threads(wanted)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        const Range mine = share(blocks, thread, team);
        Math math(rank);
        Scratch<Operand> packed(Math::packed_size(rank)), du(Math::kTile * width), tile(Math::kTile * width);
        Scratch<float> sum(width * width);
        std::fill(sum.data(), sum.data() + width * width, 0.0f);
        for (int64_t start = 0; start < tokens; start += chunk) {
            const int64_t stop = std::min(start + chunk, tokens);
            const Range some = share(stop - start, thread, team);
            for (int64_t t = start; t < stop; t++) {  // the first block's rows; each block fetches the next one's
                fetch_to_write(d + t * in + mine.begin * rank, rank);
                if (d_bone) fetch(x[t] + mine.begin * rank, rank);
            }
            sum_shards(shift.data() + some.begin * width, width, g, {start + some.begin, start + some.end}, out, rank);
#pragma omp barrier
            for (int64_t b = mine.begin; b < mine.end; b++) {
                Math::pack(packed.data(), bone + b * rank * rank, rank);
                for (int64_t first = start; first < stop; first += Math::kTile) {
                    const int64_t count = std::min(Math::kTile, stop - first);
                    const Rows<E> here{d + first * in + b * rank, in};
                    const Rows<const Operand> left{du.data(), width};
                    for (int64_t t = 0; t < count; t++) {
                        const float* added = shift.data() + (first - start + t) * width;
                        for (int64_t c = 0; c < width; c += kLanes) {
                            const Vec dz = c < rank ? load_some(here[t] + c, rank - c) : Vec{};
                            store(du.data() + t * width + c, dz + load(added + c));
                        }
                    }
                    if (d_bone) {
                        const auto right = operands<Math, E>(tile.data(), x.from(first, b * rank), count, rank);
                        math.outer(sum.data(), left, right, count);
                    }
                    const E* next = d_bone ? x[first] + (b + 1) * rank : nullptr;
                    math.rows(left, packed.data(), count, [=, stride = x.stride](int64_t t, int64_t c, Vec product) {
                        if (c == 0) {
                            fetch_to_write(here[t] + rank, rank);
                            if (next) fetch(next + t * stride, rank);
                        }
                        store_some(here[t] + c, load_some(here[t] + c, rank - c) + product, rank - c);
                    });
                }
                if (d_bone)
                    add_sum<Math>(d_bone + b * rank * rank, totals.data() + b * width * width, sum.data(), rank,
                                  start == 0, stop == tokens);
            }
#pragma omp barrier
        }
    }
}

}  // namespace
