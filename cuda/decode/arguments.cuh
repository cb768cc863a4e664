// The arguments of the kernels of decoding.
#pragma once
#include "common/device.cuh"

// ops/decode/__init__.py mirrors it by field. Elements of x and y are bf16; tensors are contiguous and aligned to 16
// bytes. ops/decode/blocks.py says how words hold a matrix (out, in).
struct DecodeArguments {
    const void* x;      // (rows, in_features)
    const void* words;  // (panels, in_features / 32, bits * 16 + 8)
    void* y;            // (rows, out_features); or the matrix that the blocks stand for
    index_t in_features, out_features;
    int rows;
};
