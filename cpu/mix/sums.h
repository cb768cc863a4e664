// Sums that threads take apart and add up.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// Adds the threads' rows of sums, each `width` long, into `to`.
inline void add_up(float* to, const std::vector<float>& sums, int64_t width) {
    std::fill(to, to + width, 0.0f);
    for (size_t i = 0; i < sums.size(); i += width)
        for (int64_t c = 0; c < width; c++) to[c] += sums[i + c];
}

}  // namespace
