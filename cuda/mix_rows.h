// What the mix kernels share: exp, rows split among threads, where sequences begin.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"

namespace {

constexpr int64_t kBlock = 256;               // channels handled at a time: their floats stay in the first-level cache
constexpr int64_t kWorkForThreads = 1 << 15;  // elements below which waking a thread costs more than it saves

// exp(x) for x in [-87, 87], beyond which x counts as the bound, to about one unit in the last place: 2^n e^f with
// |f| <= ln 2 / 2, where e^f is a minimax polynomial.
inline float bounded_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 87.0f ? 87.0f : x;         // both bounds let a NaN through
    const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
    const float shifted = x * 1.44269504088896341f + kRound;
    const float n = shifted - kRound;
    const float f = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
    float p = f * 1.38145e-3f + 8.36875e-3f;
    p = p * f + 4.166839e-2f;
    p = p * f + 1.666652e-1f;
    p = p * f + 0.49999993f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);  // its low bits hold n
    bits = (bits + 127u) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + bounded_exp(-x)); }

// work(begin, end, thread) over [0, count), split among threads.
template <class Work>
void parallel(int64_t count, int64_t elements, int threads, const Work& work) {
    if (elements < kWorkForThreads) threads = 1;
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
        work(count * i / n, count * (i + 1) / n, static_cast<int>(i));
    }
}

// Adds the threads' rows of sums, each `width` long, into `to`.
void add_up(float* to, const std::vector<float>& sums, int64_t width) {
    std::fill(to, to + width, 0.0f);
    for (size_t i = 0; i < sums.size(); i += width)
        for (int64_t c = 0; c < width; c++) to[c] += sums[i + c];
}

// Where each row's sequence begins: sequences of `length` rows, or those that cu_seqlens bounds.
struct Sequences {
    int64_t tokens, length, count;
    const int64_t* cu_seqlens;

    // Bounds that make no sense are refused elsewhere; here they must only not lead out of the tensors.
    int64_t of(int64_t t) const {
        if (!cu_seqlens) return t / length;
        const int64_t above = std::upper_bound(cu_seqlens, cu_seqlens + count, t) - cu_seqlens;
        return std::max<int64_t>(above - 1, 0);
    }
    int64_t start(int64_t sequence) const {
        return cu_seqlens ? std::max<int64_t>(cu_seqlens[sequence], 0) : sequence * length;
    }
};

}  // namespace
