"""What Bone's forms do besides their product with the weight."""

from .op import add_tiled_, affine, affine_backward_, shard_sum, split_shards

__all__ = ["add_tiled_", "affine", "affine_backward_", "shard_sum", "split_shards"]
