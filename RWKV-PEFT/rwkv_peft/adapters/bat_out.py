"""bat-out: Bone in its block affine form by output block. Hugging Face peft's bat."""

from dataclasses import dataclass

from torch import Tensor

from ..config import AdapterConfig
from .block_affine import BlockAffine, misfit, sizes
from .change import Params
from .functions.bat_out import bat_out
from .method import HfForm, Method, Shapes, Tensors
from .product import Frozen


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    return {"bone": (out_features // config.rank, config.rank, config.rank)}


def apply(x: Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> Tensor:
    return bat_out(x, base, params["bone"])


@dataclass(frozen=True)
class ByOutput(BlockAffine):
    """The change with a matrix for each block of rows."""

    def rows(self, params: Params, start: int, stop: int) -> Params:
        rank = params["bone"].shape[-1]
        return {"bone": params["bone"][start // rank : stop // rank]}


# W'_ab = W_ab + W_ab B_a + B_a: one matrix for each block of outputs, `bone` (out/rank, rank, rank)
METHOD = Method(
    name="bat-out",
    tensors=Tensors(("bone",), ("rank",), shapes, sizes, misfit),
    change=ByOutput(index="a"),
    apply=apply,
    hf=HfForm(("bat", "bat-out"), dims=3),
)
