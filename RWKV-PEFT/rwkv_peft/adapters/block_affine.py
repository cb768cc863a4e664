"""The part that Bone's block affine forms share: each rank x rank block W_ab of the weight, a over out/rank and b over
in/rank, becomes W_ab + W_ab B + B, with one small matrix B for each b (bat-in) or each a (bat-out).

Kang and Yin 2024, arXiv 2409.15371 (its first versions).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cli.errors import UserError
from ..config import AdapterConfig
from .change import Change, Params, cast, wide
from .method import Misfit, nearest_divisor


def misfit(config: AdapterConfig, out_features: int, in_features: int) -> Misfit | None:
    common, rank = math.gcd(out_features, in_features), config.rank
    if not common % rank:
        return None
    side = out_features if out_features % rank else in_features
    return Misfit("rank", rank, f"does not divide {side}", nearest_divisor(common, rank), "bone")


def sizes(params: Params) -> dict[str, int]:
    return {"rank": params["bone"].shape[-1]}


@dataclass(frozen=True)
class BlockAffine(Change):
    """W_ab + W_ab B + B for a matrix B of `bone`: index is the letter of the axis whose blocks share it."""

    index: str = field(kw_only=True)

    def delta(self, weight: Tensor, params: Params, scale: float = 1.0) -> Tensor:
        params = cast(params, weight.dtype)
        return self._of_blocks(blocks_of(weight, params["bone"].shape[-1]), params).reshape(weight.shape)

    def added(self, base: Tensor, params: Params, scale: float) -> Tensor:
        """Added block by block, which spares `delta`'s copy into the weight's order."""
        params = cast(params, torch.float32)
        blocks = blocks_of(base, params["bone"].shape[-1])
        return (blocks + self._of_blocks(blocks, params)).reshape(base.shape)

    def _of_blocks(self, blocks: Tensor, params: Params) -> Tensor:
        """-> the change of each block, (out/r, r, in/r, r), in no particular order in memory."""
        bone = params["bone"]
        addend = bone.transpose(0, 1) if self.index == "b" else bone[:, :, None]  # (r, in/r, r) or (out/r, r, 1, r)
        return torch.einsum(f"aobj,{self.index}ji->aobi", blocks, bone).add_(addend)

    def row_unit(self, params: Params) -> int:
        return params["bone"].shape[-1]

    def times(self, params: Params, amount: float) -> Params:
        return {**params, "bone": amount * wide(params["bone"])}

    def opposite(self, params: Params) -> Params:
        """W' = W (I + B) + B is undone by the change of the same form with C = (I + B)^-1 - I in B's place:
        W = (W' - B)(I + B)^-1 = W' (I + C) + C. Raises UserError if I + B has no inverse."""
        bone = params["bone"].double()
        identity = torch.eye(bone.shape[-1], dtype=bone.dtype, device=bone.device)
        inverse, singular = torch.linalg.inv_ex(identity + bone)
        if singular.any():
            raise UserError(
                "an I + B of the adapter has no inverse, so that merging lost the base; take the base itself"
            )
        return {"bone": inverse - identity}


def blocks_of(weight: Tensor, rank: int) -> Tensor:
    """(out, in) -> (out/r, r, in/r, r), a view."""
    return weight.unflatten(0, (-1, rank)).unflatten(2, (-1, rank))
