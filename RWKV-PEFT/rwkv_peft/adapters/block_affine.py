"""What Bone's block affine forms share: each rank x rank block W_ab of the weight, a over out/rank and b over in/rank,
becomes W_ab + W_ab B + B, with one small matrix B for each b (bat-in) or each a (bat-out).

Kang and Yin 2024, arXiv 2409.15371 (its first versions).
"""

import math

import torch

from ..errors import UserError
from .method import Method, Misfit, Params, cast, nearest_divisor


class BlockAffine(Method):
    """bat-in and bat-out, up to which blocks share a matrix: index is the letter of the blocks' axis."""

    peft, json_flag, rank_flag = "bone", "bone_config", "--bone_r"
    parameters = ("bone",)
    index: str
    hf_dims = 3

    def fit(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Misfit | None:
        common = math.gcd(out_features, in_features)
        if not common % rank:
            return None
        side = out_features if out_features % rank else in_features
        return Misfit("rank", rank, f"does not divide {side}", nearest_divisor(common, rank), "bone")

    def sizes(self, params: Params) -> tuple[int, int]:
        return params["bone"].shape[-1], 0

    def delta(self, weight: torch.Tensor, params: Params, scale: float = 1.0) -> torch.Tensor:
        params = cast(params, weight.dtype)
        return self._change(blocks_of(weight, params["bone"].shape[-1]), params).reshape(weight.shape)

    def merged_with(self, base: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
        """Added block by block, which spares `delta`'s copy into the weight's order."""
        params = cast(params, torch.float32)
        blocks = blocks_of(base, params["bone"].shape[-1])
        return (blocks + self._change(blocks, params)).reshape(base.shape)

    def multiplied(self, params: Params) -> torch.Tensor:
        """What blocks are multiplied by, where `bone` is added to them."""
        return params["bone"]

    def _change(self, blocks: torch.Tensor, params: Params) -> torch.Tensor:
        """-> the change of each block, (out/r, r, in/r, r), in no particular order in memory."""
        bone = params["bone"]
        addend = bone.transpose(0, 1) if self.index == "b" else bone[:, :, None]  # (r, in/r, r) or (out/r, r, 1, r)
        return torch.einsum(f"aobj,{self.index}ji->aobi", blocks, self.multiplied(params)).add_(addend)

    def row_unit(self, params: Params) -> int:
        return params["bone"].shape[-1]

    def opposite(self, params: Params, scale: float, amount: float = 1.0) -> Params:
        """W' = W (I + B) + B is undone by the change of the same form with C = (I + B)^-1 - I in B's place:
        W = (W' - B)(I + B)^-1 = W' (I + C) + C. Raises UserError where I + B has no inverse."""
        bone = amount * params["bone"].double()
        identity = torch.eye(bone.shape[-1], dtype=bone.dtype, device=bone.device)
        inverse, singular = torch.linalg.inv_ex(identity + bone)
        if singular.any():
            raise UserError(
                "an I + B of the adapter has no inverse, so that merging lost the base; take the base itself"
            )
        return {"bone": inverse - identity}


def blocks_of(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """(out, in) -> (out/r, r, in/r, r), a view."""
    return weight.unflatten(0, (-1, rank)).unflatten(2, (-1, rank))
