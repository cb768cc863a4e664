// Token shift with interpolation: out_i = x + (previous - x) m_i, where previous is the row before, and the weights
//
//     m_i[t] = maa_i + low_i[t] up_i          low_i[t] (rank,), up_i (rank, channels); rank 0: maa_i alone
//
// depend on the token through a product of low rank (RWKV-6, arXiv 2404.05892, eq. 12 to 14). That product is computed
// a tile of rows at a time, right before its use, in forward and again in backward: as a tensor it would be n times as
// large as x, and be written and read twice.
//
// Backward, with e_i = g_i (previous - x):
//     gx[t] = sum_i g_i[t] (1 - m_i[t]) + sum_i g_i[t + 1] m_i[t + 1]      the latter only within a sequence
//     gmaa_i = sum_t e_i[t],   glow_i[t] = e_i[t] up_i^T,   gup_i = sum_t low_i[t]^T e_i[t]
// Backward walks from the last row to the first, so that a row's gradient for the row before it is at hand in time.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/bfloat16.h"
#include "common/products.h"
#include "common/threads.h"
#include "mix/sequences.h"
#include "mix/sums.h"

namespace {

constexpr int64_t kBlock = 256;  // channels handled at a time: their floats stay in the first-level cache
constexpr int kGroup = 4;        // rows that share a factor once it is loaded
constexpr int kTileRows = 8;

// A product of `rows` rows, added to what is there.
template <bool kTurned>
void add_product(const Product<FloatWords>& product, int64_t rows) {
    multiply<Kind<true, kTurned>, kGroup>(product, rows);
}

// x, outs (tokens, channels); last (sequences, channels) or null for zeros; maa (n, channels); low (tokens, n * rank)
// and up (n, rank, channels), null where rank is 0.
template <class E>
struct Lerp {
    const E *x, *last, *maa, *low;
    const float* up;
    Sequences sequences;
    int64_t channels, rank;
    int n;

    // The row before t, or null for zeros.
    const E* previous(int64_t t, int64_t sequence) const {
        if (t > sequences.start(sequence)) return x + (t - 1) * channels;
        return last ? last + sequence * channels : nullptr;
    }

    // previous - x of row t: kLanes channels, of which `left` are left, from channel c on; `before` is its previous().
    Vec difference(int64_t t, const E* before, int64_t c, int64_t left) const {
        const Vec here = load_some(x + t * channels + c, left);
        return before ? load_some(before + c, left) - here : -here;
    }

    // The rows' low factors as floats: (rows, n * rank).
    void load_low(int64_t t, int64_t rows, std::vector<float>& factors) const {
        for (int64_t i = 0; i < rows * n * rank; i++) factors[i] = to_float(low[t * n * rank + i]);
    }

    // m_i of some rows, for `size` channels from `begin` on: (rows, kBlock), or one row where all are alike. One row
    // takes up_i as it lies in memory, from which reading it takes longest.
    void weights(int i, const std::vector<float>& factors, int64_t rows, int64_t begin, int64_t size, float* m) const {
        const E* base = maa + i * channels + begin;
        for (int64_t a = 0; a < (rank ? rows : 1); a++)
            for (int64_t c = 0; c < size; c += kLanes) store(m + a * kBlock + c, load_some(base + c, size - c));
        if (!rank) return;
        if (rows == 1) {
            const float* row = up + i * rank * channels + begin;
            for (int64_t k = 0; k < rank; k++, row += channels)
                for (int64_t c = 0; c < size; c++) m[c] += factors[i * rank + k] * row[c];
            return;
        }
        add_product<false>(
            {m, kBlock, factors.data() + i * rank, n * rank, up + i * rank * channels + begin, channels, rank, size},
            rows);
    }

    void forward(E* const* outs, int threads) const {
        parallel(sequences.tokens, sequences.tokens * channels * n, threads, [&](int64_t first, int64_t end, int) {
            std::vector<float> factors(kTileRows * n * rank), m(kTileRows * kBlock), delta(kTileRows * kBlock);
            for (int64_t t = first; t < end; t += kTileRows) {
                const int64_t rows = std::min<int64_t>(kTileRows, end - t);
                load_low(t, rows, factors);
                const int64_t block = rows == 1 ? kTileRows * kBlock : kBlock;
                for (int64_t begin = 0; begin < channels; begin += block) {
                    const int64_t size = std::min(block, channels - begin);
                    for (int64_t a = 0; a < rows; a++) {
                        const E* before = previous(t + a, sequences.of(t + a));
                        for (int64_t c = 0; c < size; c += kLanes)
                            store(delta.data() + a * kBlock + c, difference(t + a, before, begin + c, size - c));
                    }
                    for (int i = 0; i < n; i++) {
                        weights(i, factors, rows, begin, size, m.data());
                        for (int64_t a = 0; a < rows; a++) {
                            const E* here = x + (t + a) * channels + begin;
                            const float *d = delta.data() + a * kBlock, *weight = m.data() + (rank ? a * kBlock : 0);
                            E* out = outs[i] + (t + a) * channels + begin;
                            for (int64_t c = 0; c < size; c += kLanes) {
                                const int64_t left = size - c;
                                store_some(out + c, load_some(here + c, left) + load(d + c) * load(weight + c), left);
                            }
                        }
                    }
                }
            }
        });
    }

    // Places for the gradients; maa's and up's are float. Any may be null; those of low and up need rank above 0.
    struct Gradients {
        E *x, *last;
        float* maa;
        E* low;
        float* up;
    };

    void backward(const E* const* grads, const Gradients& to, int threads) const {
        const int64_t width = n * channels;
        Sums maa_sums(to.maa, width, threads), up_sums(to.up, width * rank, threads);
        parallel(sequences.tokens, sequences.tokens * width, threads, [&](int64_t first, int64_t end, int thread) {
            Tile tile(*this, maa_sums.of(thread), up_sums.of(thread));
            if (first < end && end < sequences.tokens && sequences.start(sequences.of(end)) < end)
                tile.look_at(grads, end);
            for (int64_t stop = end; stop > first; stop -= kTileRows)
                tile.backward(grads, to, std::max(first, stop - kTileRows), stop);
        });
        maa_sums.add_up();
        up_sums.add_up();
    }

    // A tile of rows on its way back.
    class Tile {
      public:
        // maa_sum (n, channels) and up_sum (n, rank, channels) gather those gradients; null if not wanted.
        Tile(const Lerp& lerp, float* maa_sum, float* up_sum)
            : lerp_(lerp),
              maa_sum_(maa_sum),
              up_sum_(up_sum),
              factors_(kTileRows * lerp.n * lerp.rank),
              m_(kTileRows * kBlock),
              whole_(kTileRows * lerp.channels),
              shifted_(whole_),
              e_(whole_),
              carried_(lerp.channels) {}

        // Only the gradient that row t, another thread's, gives to the row before it.
        void look_at(const E* const* grads, int64_t t) {
            gather(grads, t, 0, 1, false);
            std::copy_n(shifted_.begin(), lerp_.channels, carried_.begin());
        }

        void backward(const E* const* grads, const Gradients& to, int64_t first, int64_t end) {
            const int64_t C = lerp_.channels, rows = end - first;
            // without a product to share, so many rows that what they are added to stays in the first-level cache
            const int64_t part = lerp_.rank ? kTileRows : kTileRows / 2;
            for (int64_t a = 0; a < rows; a += part)
                gather(grads, first + a, a, std::min(part, rows - a), maa_sum_ || up_sum_ || to.low, to.low);
            for (int64_t t = end - 1; t >= first; t--) {
                const int64_t sequence = lerp_.sequences.of(t);
                const bool starts = t == lerp_.sequences.start(sequence);
                const float *whole = whole_.data() + (t - first) * C, *shifted = shifted_.data() + (t - first) * C;
                if (to.x)
                    for (int64_t c = 0; c < C; c += kLanes) {
                        const int64_t left = C - c;
                        const Vec g = load_some(whole + c, left) - load_some(shifted + c, left);
                        store_some(to.x + t * C + c, g + load_some(carried_.data() + c, left), left);
                    }
                if (starts && to.last)
                    for (int64_t c = 0; c < C; c++) to.last[sequence * C + c] = from_float<E>(shifted[c]);
                for (int64_t c = 0; c < C; c++) carried_[c] = starts ? 0.0f : shifted[c];
            }
        }

      private:
        // whole = sum_i g_i, shifted = sum_i g_i m_i of `rows` rows from t on, the tile's from `at` on; if `sums`, also
        // the sums over e_i.
        void gather(const E* const* grads, int64_t t, int64_t at, int64_t rows, bool sums, E* low = nullptr) {
            const int64_t C = lerp_.channels;
            std::fill_n(whole_.begin() + at * C, rows * C, 0.0f);
            std::fill_n(shifted_.begin() + at * C, rows * C, 0.0f);
            lerp_.load_low(t, rows, factors_);
            for (int i = 0; i < lerp_.n; i++) {
                for (int64_t begin = 0; begin < C; begin += kBlock) {
                    const int64_t size = std::min(kBlock, C - begin);
                    lerp_.weights(i, factors_, rows, begin, size, m_.data());
                    for (int64_t a = 0; a < rows; a++) {
                        const E* grad = grads[i] + (t + a) * C + begin;
                        const float* m = m_.data() + (lerp_.rank ? a * kBlock : 0);
                        const int64_t to = (at + a) * C + begin;
                        float *whole = whole_.data() + to, *shifted = shifted_.data() + to;
                        for (int64_t c = 0; c < size; c += kLanes) {
                            const int64_t left = size - c;
                            const Vec g = load_some(grad + c, left);
                            add_some(whole + c, g, left);
                            add_some(shifted + c, g * load(m + c), left);
                        }
                        if (!sums) continue;
                        float* e = e_.data() + a * C + begin;
                        const E* before = lerp_.previous(t + a, lerp_.sequences.of(t + a));
                        for (int64_t c = 0; c < size; c += kLanes) {
                            const int64_t left = size - c;
                            const Vec g = load_some(grad + c, left);
                            store_some(e + c, lerp_.difference(t + a, before, begin + c, left) * g, left);
                        }
                    }
                }
                if (sums) add_sums(i, t, rows, low);
            }
        }

        void add_sums(int i, int64_t t, int64_t rows, E* low) {
            const int64_t C = lerp_.channels, rank = lerp_.rank, factor_stride = lerp_.n * rank;
            if (maa_sum_)
                for (int64_t a = 0; a < rows; a++)
                    for (int64_t c = 0; c < C; c++) maa_sum_[i * C + c] += e_[a * C + c];
            if (low) {
                E* own = low + t * factor_stride + i * rank;
                const float* matrix = lerp_.up + i * rank * C;
                int64_t k = 0;
                for (; k + kGroup <= rank; k += kGroup) dots<kGroup>(own + k, matrix + k * C, rows);
                for (; k < rank; k++) dots<1>(own + k, matrix + k * C, rows);
            }
            if (up_sum_)  // low^T e: the tile's rows are the product's inner dimension
                add_product<true>(
                    {up_sum_ + i * rank * C, C, factors_.data() + i * rank, factor_stride, e_.data(), C, rows, C},
                    rank);
        }

        template <int kCount>
        void dots(E* to, const float* matrix, int64_t rows) const {
            const int64_t C = lerp_.channels, stride = lerp_.n * lerp_.rank;
            int64_t a = 0;
            for (; a + kGroup <= rows; a += kGroup)
                dot_products<kGroup, kCount>(to + a * stride, stride, e_.data() + a * C, C, matrix, C);
            for (; a < rows; a++) dot_products<1, kCount>(to + a * stride, stride, e_.data() + a * C, C, matrix, C);
        }

        const Lerp& lerp_;
        float *maa_sum_, *up_sum_;
        std::vector<float> factors_, m_, whole_, shifted_, e_, carried_;
    };
};

}  // namespace
