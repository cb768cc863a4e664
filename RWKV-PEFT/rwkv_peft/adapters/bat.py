"""Bone in its block affine forms: each rank x rank block of the weight goes through W B + B."""

from . import functional
from .base import AdapterLinear
from .weight_side import bat_out


class BatInLinear(AdapterLinear):
    """One matrix for each block of inputs: `bone` (in/rank, rank, rank)."""

    parameter_names = ("bone",)

    def __init__(self, base, config):
        super().__init__(base, config)
        self.bone = self.new_parameter(base.in_features // config.rank, config.rank, config.rank)

    def forward(self, x):
        return functional.bat_in(x, self.base, self.bone, self.bias, product=self.product)


class BatOutLinear(AdapterLinear):
    """One matrix for each block of outputs: `bone` (out/rank, rank, rank)."""

    parameter_names = ("bone",)

    def __init__(self, base, config):
        super().__init__(base, config)
        self.bone = self.new_parameter(base.out_features // config.rank, config.rank, config.rank)

    def forward(self, x):
        return bat_out(x, self.base, self.bone, self.bias, product=self.product)
