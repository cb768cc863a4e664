"""Bone by dimension sharding, and its mini form: every shard of the input shares one small matrix."""

from . import functional
from .base import AdapterLinear


class BoneLinear(AdapterLinear):
    """y = (W + D repeated) x with D = `bone` (rank, out); bone-mini keeps (rank, mini_rank) of it."""

    parameter_names = ("bone",)

    def __init__(self, base, config):
        super().__init__(base, config)
        width = config.mini_rank if config.variant == "bone-mini" else base.out_features
        self.bone = self.new_parameter(config.rank, width)

    def forward(self, x):
        return functional.bone(x, self.base, self.bone, self.bias, product=self.product)
