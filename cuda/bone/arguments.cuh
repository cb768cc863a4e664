// The arguments of bone's kernels.
#pragma once
#include "common/device.cuh"

// One structure for all kernels; ops/bone/cuda.py mirrors it field by field. Elements are bf16. Tensors are contiguous
// and aligned to 16 bytes; shard b is columns b rank to (b + 1) rank of a row.
struct BoneArguments {
    const void* x;     // (tokens, width): affine's and the shard sum's input; null in backward: no gradient of bone;
                       // or the weight that merges, (blocks rank, width)
    const void* bone;  // (shards, rank, rank)
    void* z;           // (tokens, width)
    void* shift;       // (groups, tokens, rank): each group's part of the sum over shards
    const void* d;     // (tokens, width): the gradient of z
    void* dx;          // (tokens, width): the gradient of x; may be d
    const void* g;     // (tokens, rank): the gradient of the shift
    float* parts;      // (strips, shards, rank, rank): each strip's part of bone's gradient
    const void* tile;  // (groups, tokens, rank): the parts of a tile, to be added up
    void* tiled;       // (tokens, width): the tiles, repeated along the rows
    void* total;       // (tokens, rank): the sum over shards; or `count` elements: the sum of `groups` parts
    index_t tokens, count;
    int width, rank;
    int groups, strip;  // strip: tokens, or rows of rank elements of a weight, that a block has
};
