// Sequences of one length, or packed into one row.
#pragma once
#include <algorithm>
#include <cstdint>

namespace {

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
