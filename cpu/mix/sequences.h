// Sequences of one length, or packed into one row.
#pragma once
#include <algorithm>
#include <cstdint>

namespace {

// The start of each row's sequence: sequences have `length` rows, or the bounds cu_seqlens.
struct Sequences {
    int64_t tokens, length, count;
    const int64_t* cu_seqlens;

    // Wrong bounds are refused elsewhere; here they only must not lead out of the tensors.
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
