// Cross-entropy of given logits on CPUs: loss = log sum exp(logits) - logits[target], and its gradient in the logits'
// place.
//
// Logits are float or bfloat16, sums are taken in float. The loops are plain, for the compiler to vectorize; the
// library is compiled for one instruction set.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/dispatch.h"
#include "common/exp.h"
#include "common/threads.h"
#include "cross_entropy/arguments.h"

namespace {

constexpr int64_t kBlock = 256;  // logits whose floats are added up in one sum

// Computes each row's loss; if `gradient`, replaces the row by scale times the loss's gradient, plus scale * pull *
// (its largest logit) at its largest logit.
template <class E>
void cross_entropy(E* logits, const int64_t* targets, float* losses, int64_t rows, int64_t vocabulary, float scale,
                   float pull, bool gradient, int threads) {
    parallel(rows, rows * vocabulary, threads, [=](int64_t first, int64_t end, int) {
        std::vector<float> powers(gradient ? vocabulary : 0);  // of a row, which stay in the cache
        for (int64_t row = first; row < end; row++) {
            E* x = logits + row * vocabulary;
            float largest = to_float(x[0]);
            int64_t block_of_largest = 0;
            for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
                const int64_t stop = std::min(begin + kBlock, vocabulary);
                float most = largest;
#pragma omp simd reduction(max : most)
                for (int64_t i = begin; i < stop; i++) most = std::max(most, to_float(x[i]));
                if (most > largest) largest = most, block_of_largest = begin;
            }
            int64_t where = block_of_largest;
            while (where < vocabulary - 1 && to_float(x[where]) != largest) where++;
            double sum = 0.0;  // of float sums of blocks: a vocabulary's worth of floats would lose a digit
            for (int64_t begin = 0; begin < vocabulary; begin += kBlock) {
                const int64_t stop = std::min(begin + kBlock, vocabulary);
                float part = 0.0f;
                if (gradient) {
#pragma omp simd reduction(+ : part)
                    for (int64_t i = begin; i < stop; i++) part += powers[i] = exp_of(to_float(x[i]) - largest);
                } else {
#pragma omp simd reduction(+ : part)
                    for (int64_t i = begin; i < stop; i++) part += exp_of(to_float(x[i]) - largest);
                }
                sum += part;
            }
            const int64_t target = targets[row];
            losses[row] = __builtin_logf(static_cast<float>(sum)) + (largest - to_float(x[target]));
            if (!gradient) continue;
            const float factor = static_cast<float>(scale / sum);
            const float at_target = powers[target] * factor - scale;
            for (int64_t i = 0; i < vocabulary; i++) x[i] = from_float<E>(powers[i] * factor);
            x[target] = from_float<E>(at_target);
            const float at_largest = where == target ? at_target : factor;  // exp(0) is 1
            x[where] = from_float<E>(at_largest + scale * pull * largest);
        }
    });
}

}  // namespace

extern "C" {

BY_TYPE(cross_entropy, CrossEntropyArguments,
        cross_entropy(out<E>(a->logits), a->targets, a->losses, a->rows, a->vocabulary, a->scale, a->pull,
                      a->gradient != 0, a->threads))
}
