// The arguments of the cross-entropy kernels.
#pragma once
#include "common/device.cuh"

// ops/cross_entropy.py mirrors it field by field. Elements are bf16; logits are contiguous and aligned to 16 bytes.
struct CrossEntropyArguments {
    const void* logits;      // (rows, vocabulary)
    void* gradient;          // (rows, vocabulary), or null; may be the logits
    const index_t* targets;  // (rows)
    float* losses;           // (rows)
    index_t vocabulary;
    float scale, pull;
};
