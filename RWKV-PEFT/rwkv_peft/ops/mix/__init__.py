"""The models' operations between their matrix products: token shift with interpolation, gates, keys, the normalization
of heads."""

from .op import (
    delta_keys,
    last_token,
    lerp,
    norm_bonus_gate,
    norm_gate,
    relu_square,
    sigmoid_gate,
    token_shift,
    value_residual,
)

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
