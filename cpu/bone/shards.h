// bone's sums over the shards of a row, and a tile added to all of them.
#pragma once
#include "bone/tile.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace {

// total (rows, `width` apart) = the sum of a row's shards, the last of which may be short.
template <class E>
void sum_shards(float* total, int64_t width, Rows<const E> x, Range rows, int64_t in, int64_t rank) {
    constexpr int kColumns = 4;  // vectors whose sums stay in registers
    const int64_t whole = in / rank * rank;
    for (int64_t t = rows.begin; t < rows.end; t++) {
        float* to = total + (t - rows.begin) * width;
        int64_t c = 0;
        for (; c + kColumns * kLanes <= rank; c += kColumns * kLanes) {
            Vec sum[kColumns] = {};
            for (const E* at = x[t] + c; at < x[t] + whole; at += rank)
                for (int v = 0; v < kColumns; v++) sum[v] += load(at + v * kLanes);
            for (int v = 0; v < kColumns; v++) store(to + c + v * kLanes, sum[v]);
        }
        for (; c < rank; c += kLanes) {
            Vec sum = {};
            for (int64_t b = 0; b < whole; b += rank) sum += load_some(x[t] + b + c, rank - c);
            store(to + c, sum);
        }
        for (c = 0; c < in - whole; c += kLanes)
            store(to + c, load(to + c) + load_some(x[t] + whole + c, in - whole - c));
    }
}

template <class E>
void shard_sum(Rows<const E> x, E* total, int64_t tokens, int64_t in, int64_t rank, int threads) {
    const int wanted = useful(threads, tokens, tokens * in);
#pragma omp parallel num_threads(wanted)
    {
        Scratch<float> sum(round_up(rank, kLanes));
        const Range rows = share(tokens, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t t = rows.begin; t < rows.end; t++) {
            sum_shards(sum.data(), 0, x, {t, t + 1}, in, rank);
            for (int64_t c = 0; c < rank; c += kLanes) store_some(total + t * rank + c, load(sum.data() + c), rank - c);
        }
    }
}

// y (tokens, width) += tile (tokens, rank), repeated along the row and cut at its end.
template <class E>
void add_tiled(E* y, const E* tile, int64_t tokens, int64_t width, int64_t rank, int threads) {
    const int wanted = useful(threads, tokens, tokens * width);
#pragma omp parallel num_threads(wanted)
    {
        const Range rows = share(tokens, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t t = rows.begin; t < rows.end; t++) {
            E* row = y + t * width;
            for (int64_t c = 0; c < rank; c += kLanes) {
                const Vec added = load_some(tile + t * rank + c, rank - c);
                for (int64_t b = c; b < width; b += rank) {
                    const int64_t n = std::min(rank - c, width - b);
                    store_some(row + b, load_some(row + b, n) + added, n);
                }
            }
        }
    }
}

}  // namespace
