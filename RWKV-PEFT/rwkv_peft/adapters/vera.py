"""VeRA (Kopiczko et al. 2024, arXiv 2310.11454): random matrices A and B, frozen and shared by all layers. Two vectors,
which scale the inner features and the outputs, train.

W' = W + c diag(b) B diag(d) A with b = `vera_b` (out,), which starts at zero, d = `vera_d` (rank,), and A (rank, in), B
(out, rank) uniform in [-1, 1), as bfloat16 holds them. c = 6 / sqrt(in rank) gives both the size of the paper's Kaiming
initialization. A file holds the seed of A and B, `vera_seed` (1,).
"""

import functools
import math
from types import MappingProxyType

import torch
from torch import Tensor

from ..config import AdapterConfig
from .change import Params
from .functions.lora import lora
from .method import Layer, Method, Misfit, Shapes, Tensors
from .product import Frozen
from .seeded import SeededSum, rows_of, seed_in, seeded, uniform


def fit(config: AdapterConfig, out_features: int, in_features: int) -> Misfit | None:
    """Bound A and B, which are not in the file: a d of megabytes could need terabytes of them."""
    most = out_features + in_features
    if config.rank <= most:
        return None
    return Misfit("rank", config.rank, f"is more than {most}, the layer's inputs and outputs together", most)


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    return {"vera_b": (out_features,), "vera_d": (config.rank,), "vera_seed": (1,)}


def draw(layer: Layer, config: AdapterConfig) -> None:
    torch.nn.init.constant_(layer.get_parameter("vera_d"), config.d_initial)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def shared(seed: int, axis: int, width: int, rank: int, dtype: torch.dtype) -> Tensor:
    """B (axis 0) or Aᵀ (axis 1), of at least `width` rows: (n, rank)."""
    return (2 * uniform(seed, axis, width, rank) - 1).bfloat16().to(dtype)


def buffers(seed: int, layer: Layer) -> Params:
    """A layer's B and Aᵀ; on a CPU all layers share their memory."""
    weight, rank = layer.weight, layer.get_parameter("vera_d").shape[0]
    B, A = (shared(seed, axis, size, rank, weight.dtype)[:size] for axis, size in enumerate(weight.shape))
    return {"vera_A": A, "vera_B": B}


def size(rank: int, in_features: int) -> float:
    return 6 / math.sqrt(in_features * rank)


def apply(x: Tensor, base: Frozen, params: Params, scale: float, dropout: float) -> Tensor:
    A, B = (params["vera_A"] * params["vera_d"]).t(), params["vera_b"][:, None] * params["vera_B"]
    return lora(x, base, A, B, size(A.shape[0], x.shape[-1]))


def as_lora(params: Params, scale: float, out_features: int, in_features: int) -> Params:
    """lora_A = diag(d) A; lora_B = c diag(b) B, of the rows that params are for."""
    b, d = params["vera_b"], params["vera_d"]
    seed, rank, rows = seed_in(params, "vera_seed"), d.shape[0], rows_of(params, out_features)
    kind = torch.promote_types(b.dtype, torch.float32)
    A = shared(seed, 1, in_features, rank, kind)[:in_features].to(b.device)
    B = shared(seed, 0, rows.stop, rank, kind)[rows].to(b.device)
    return {"lora_A": (A * d).t().contiguous(), "lora_B": size(rank, in_features) * (b[:, None] * B)}


def update(params: Params, scale: float, shape: tuple[int, int]) -> Tensor:
    factors = as_lora(params, scale, *shape)
    return factors["lora_B"] @ factors["lora_A"]


METHOD = Method(
    name="vera",
    tensors=Tensors(
        ("vera_b", "vera_d"), ("rank",), shapes, lambda p: {"rank": len(p["vera_d"])}, fit, ("vera_d", "vera_seed")
    ),
    change=SeededSum(MappingProxyType({"vera_b": 0}), update=update, negated=("vera_b",)),
    apply=apply,
    draw=draw,
    held=seeded("vera_seed", buffers),
    # b is zero, so that c, d and the entries of A and B, of variance 1 / 3, carry its step
    step=lambda method, config, in_features: 2 * config.d_initial / math.sqrt(in_features),
    lora=as_lora,
)
