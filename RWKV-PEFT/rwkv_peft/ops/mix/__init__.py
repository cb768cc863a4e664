"""What the models do between their matrix products: token shift with interpolation, gates, keys, the normalization of
heads."""

from .asked import Asked
from .op import (
    delta_keys,
    gated_residual,
    layer_norm,
    lerp,
    low_square,
    norm_bonus_gate,
    norm_ddlerp,
    norm_gate,
    norm_lerp,
    relu_square,
    sigmoid_gate,
    takes_bones,
    takes_left,
    takes_low_square,
    takes_sums,
    value_residual,
)
from .shift import bent, token_shift

__all__ = [
    "Asked",
    "bent",
    "delta_keys",
    "gated_residual",
    "layer_norm",
    "lerp",
    "low_square",
    "norm_bonus_gate",
    "norm_ddlerp",
    "norm_gate",
    "norm_lerp",
    "relu_square",
    "sigmoid_gate",
    "takes_bones",
    "takes_left",
    "takes_low_square",
    "takes_sums",
    "token_shift",
    "value_residual",
]
