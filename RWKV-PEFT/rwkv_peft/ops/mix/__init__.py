"""The models' operations between their matrix products: token shift with interpolation, gates, keys, the normalization
of heads."""

from .op import delta_keys, lerp, norm_bonus_gate, norm_gate, relu_square, sigmoid_gate, value_residual
from .shift import last_token, token_shift

__all__ = [
    "delta_keys",
    "last_token",
    "lerp",
    "norm_bonus_gate",
    "norm_gate",
    "relu_square",
    "sigmoid_gate",
    "token_shift",
    "value_residual",
]
