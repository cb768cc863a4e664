// The most float32 operations a second that one core reaches: independent multiply-adds in registers, as wide as the
// kernel's. Compiled by benchmarks/recurrences.py with the flags of one of the CPU kernel's instruction sets.
#include <chrono>

#include "common/vectors.h"

// Operations a second over about `seconds`; a multiply-add counts as two a lane.
extern "C" double fma_peak(double seconds) {
    using Clock = std::chrono::steady_clock;
    constexpr int kChains = kLanes == 16 ? 12 : 8;  // enough to hide a multiply-add's latency
    constexpr long kRounds = 20000;
    Vec sums[kChains];
    UNROLL for (int i = 0; i < kChains; i++) sums[i] = broadcast(1.0f + i);
    const Vec factor = broadcast(0.999f), term = broadcast(0.001f);
    double best = 0.0;
    const auto start = Clock::now();
    while (std::chrono::duration<double>(Clock::now() - start).count() < seconds) {
        const auto before = Clock::now();
        for (long round = 0; round < kRounds; round++)
            UNROLL for (int i = 0; i < kChains; i++) {
                sums[i] = sums[i] * factor + term;
                asm volatile("" : "+v"(sums[i]));  // keep every one
            }
        const double elapsed = std::chrono::duration<double>(Clock::now() - before).count();
        const double rate = 2.0 * kLanes * kChains * kRounds / elapsed;
        best = rate > best ? rate : best;
    }
    return best;
}
