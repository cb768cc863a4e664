"""What Bone's forms do besides their product with the weight."""

from .op import add_tiled_, affine, affine_backward_, merge, merge_backward_, rows_by_block, shard_sum, split_shards

__all__ = [
    "add_tiled_",
    "affine",
    "affine_backward_",
    "merge",
    "merge_backward_",
    "rows_by_block",
    "shard_sum",
    "split_shards",
]
