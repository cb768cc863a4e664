// The operations of Bone's forms beside their product with the weight, on NVIDIA GPUs: bat-in's affine form of the
// activations and its gradients, bat-out's merged weight, sums over shards, and the tile that each shard of a result
// starts from.
// NVRTC compiles this file, and a C++ compiler, with tests/cuda_shim, for the CPU.
#include "bone/arguments.cuh"
#include "bone/products.cuh"
#include "bone/shards.cuh"
#include "common/kernel.cuh"

#define PRODUCTS(R)                                                                                        \
    KERNEL(BoneArguments, bone_affine_forward_##R, products_forward<R>, ForwardProducts<R>::threads, 1,    \
           sizeof(ForwardShared<R>))                                                                       \
    KERNEL(BoneArguments, bone_affine_backward_##R, products_backward<R>, BackwardProducts<R>::threads, 1, \
           sizeof(BackwardShared<R>))                                                                      \
    KERNEL(BoneArguments, bone_merge_##R, products_merge<R>, ForwardProducts<R>::threads, 1, sizeof(MergeShared<R>))
PRODUCTS(16)
PRODUCTS(32)
PRODUCTS(64)
PRODUCTS(128)

KERNEL(BoneArguments, bone_shard_sum, shard_sum, SHARD_THREADS, 1, 0)
KERNEL(BoneArguments, bone_tiled, tiled, SHARD_THREADS, 1, 0)
KERNEL(BoneArguments, bone_sum_parts, sum_parts, SHARD_THREADS, 1, 0)
