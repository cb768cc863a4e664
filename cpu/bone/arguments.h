// The arguments of bone.cpp's C interface: a structure for each operation, which ops/bone/cpu.py mirrors field by
// field. void pointers are to float or bfloat16; a tensor with a stride has its rows that many elements apart, all
// others are contiguous.
#pragma once
#include <cstdint>

// Both directions of the affine form; see affine.h.
struct AffineArguments {
    const void *x, *bone;  // (tokens, in_features), null if d_bone is; (in_features / rank, rank, rank)
    void *z, *shift;       // forward's results: (tokens, in_features), (tokens, rank)
    void* d;               // backward: (tokens, in_features), the gradient of z, which becomes that of x
    const void* g;         // (tokens, out_features), the gradient of the output that the shift was added to
    void* d_bone;          // backward's other result: bone's gradient, or null
    int64_t x_stride, g_stride, tokens, in_features, out_features, rank;
    int bfloat16, threads;
};

// w + w B + B by blocks of rows; see merge.h.
struct MergeArguments {
    const void *w, *bone;  // (count * rank, in_features), (count, rank, rank)
    void* merged;          // like w; if d_bone is not null, it holds its own gradient at first
    void* d_bone;          // bone's gradient, or null
    int64_t count, in_features, rank;
    int bfloat16, threads;
};

// to (columns, rows) = the transpose of x (rows, columns), only for bfloat16.
struct TransposeArguments {
    const void* x;
    void* to;
    int64_t x_stride, rows, columns;
    int bfloat16, threads;
};

// total (tokens, rank) = the sum of the shards of x (tokens, in_features), the last one padded with zeros.
struct ShardSumArguments {
    const void* x;
    void* total;
    int64_t x_stride, tokens, in_features, rank;
    int bfloat16, threads;
};

// y (tokens, width) += tile (tokens, rank), repeated along the row and cut at its end.
struct AddTiledArguments {
    void* y;
    const void* tile;
    int64_t tokens, width, rank;
    int bfloat16, threads;
};
