// Sums over tokens, of which each thread takes a part.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/vectors.h"

namespace {

// Adds the first n lanes.
INLINE void add_some(float* sum, Vec x, int64_t n) { store_some(sum, load_some(sum, n) + x, n); }

// The gradient of `width` parameters, a sum over tokens: a row of zeros for each thread. Null means not wanted.
class Sums {
  public:
    Sums(float* to, int64_t width, int threads)
        : to_(to), width_(width), rows_(to ? width * std::max(1, threads) : 0, 0.0f) {}

    // A thread's row, from parameter `first` on; null if not wanted.
    float* of(int thread, int64_t first = 0) { return to_ ? rows_.data() + thread * width_ + first : nullptr; }

    // Writes the sum of the rows.
    void add_up() const {
        if (!to_) return;
        std::fill(to_, to_ + width_, 0.0f);
        for (size_t i = 0; i < rows_.size(); i += width_)
            for (int64_t c = 0; c < width_; c++) to_[c] += rows_[i + c];
    }

  private:
    float* to_;
    int64_t width_;
    std::vector<float> rows_;
};

}  // namespace
