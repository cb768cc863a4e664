"""bat-in: Bone in its block affine form by input block, evaluated on the activations. RWKV-PEFT's bat.

With u_b = B_b x_b, y = W (x + u) + tile(Σ_b u_b).
"""

from torch import Tensor

from ..config import AdapterConfig
from .block_affine import BlockAffine, misfit, sizes
from .change import Params
from .functions.bat_in import bat_in
from .method import HfForm, Method, Shapes, Tensors, Upstream
from .product import Frozen


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    return {"bone": (in_features // config.rank, config.rank, config.rank)}


def apply(x: Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> Tensor:
    return bat_in(x, base, params["bone"])


# W'_ab = W_ab + W_ab B_b + B_b: one matrix for each block of inputs, `bone` (in/rank, rank, rank)
METHOD = Method(
    name="bat-in",
    tensors=Tensors(("bone",), ("rank",), shapes, sizes, misfit),
    change=BlockAffine(index="b"),
    apply=apply,
    upstream=Upstream(),
    hf=HfForm(("bat-in",), dims=3),
)
