"""bone-signed: dimension sharding whose sums over the shards of the input have signs."""

import torch

from ..product import DENSE, Product
from .lora import lora


def bone_signed(
    x: torch.Tensor,
    weight: torch.Tensor,
    bone: torch.Tensor,
    signs: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    product: Product = DENSE,
) -> torch.Tensor:
    """Dimension sharding with signs: W'[o, i] = W[o, i] + s_i D[i mod r, o].

    x (..., in), weight (out, in), bone (r, out), signs (in,), bias (out,) or None -> (..., out) in x's dtype. in need
    not be a multiple of r.
    """
    return lora(x, weight, sketch(signs, bone.shape[0]), bone.t(), bias, product=product)


def sketch(signs: torch.Tensor, rank: int) -> torch.Tensor:
    """Signs (in,) -> the matrix (rank, in) that sums the shards of an input with them."""
    width = signs.shape[0]
    shards = torch.eye(rank, dtype=signs.dtype, device=signs.device).repeat(1, -(-width // rank))
    return shards[:, :width] * signs
