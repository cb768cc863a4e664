"""The operations of Bone's forms beside their product with the weight."""

from .op import affine, affine_backward_, merge, merge_backward_, plus_tiled, rows_by_block, shard_sum, split_shards

__all__ = [
    "affine",
    "affine_backward_",
    "merge",
    "merge_backward_",
    "plus_tiled",
    "rows_by_block",
    "shard_sum",
    "split_shards",
]
