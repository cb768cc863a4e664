"""What RWKV-6 does between its matrix products: token shift with interpolation, gates, the normalization of heads."""

from .op import lerp, norm_gate, relu_square, sigmoid_gate, token_shift

__all__ = ["lerp", "norm_gate", "relu_square", "sigmoid_gate", "token_shift"]
