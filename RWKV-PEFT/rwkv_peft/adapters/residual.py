"""LoRA that starts from factors of the weight or of its gradient, which it takes out of the weight.

PiSSA, OLoRA and LoRA-GA train on the base W - scale B0 A0, so that the layer begins where the model was; the factors go
into the adapter file, and merging starts from the original weight: W' = W + scale (B A - B0 A0) with A0 = `init_lora_A`
and B0 = `init_lora_B`.
"""

import math
from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from ..config import AdapterConfig
from . import low_rank
from .change import Params, Sum
from .method import (
    Alpha,
    Constants,
    FirstStep,
    Initial,
    Layer,
    Method,
    Residual,
    Shapes,
    Tensors,
    Upstream,
    UpstreamLayer,
    rank_up_to,
)

NAMES = ("lora_A", "lora_B")
FIRST = ("init_lora_A", "init_lora_B")


def shapes(config: AdapterConfig, out_features: int, in_features: int) -> Shapes:
    factors = low_rank.shapes(config, out_features, in_features)
    return factors | {f"init_{name}": shape for name, shape in factors.items()}


def keep(layer: Layer, constants: Params) -> None:
    """Begin at the first factors, and take them out of the weight."""
    with torch.no_grad():
        for name in NAMES:
            factor = constants[f"init_{name}"].to(layer.weight.device, layer.weight.dtype).contiguous()
            layer.get_parameter(name).copy_(factor)
            layer.register_buffer(f"init_{name}", factor, persistent=False)
    # The storage may be the memory-mapped base file's, which others still read: replaced, not written to.
    params = {name: getattr(layer, name) for name in FIRST}
    layer.weight.data = training_base(layer.weight.detach(), params, layer.scale)


def training_base(weight: Tensor, params: Params, scale: float) -> Tensor:
    change = scale * (params["init_lora_B"].float() @ params["init_lora_A"].float())
    return (weight.float() - change).to(weight.dtype)


def first(params: Params) -> Params:
    return {**params, **{name: params[f"init_{name}"] for name in NAMES}}


def update(params: Params, scale: float, shape: tuple[int, int]) -> Tensor:
    return low_rank.update(params, scale, shape) - scale * (params["init_lora_B"] @ params["init_lora_A"])


class Difference(Sum):
    """scale (B A - B0 A0). A base that was trained on lacks B0 A0 already."""

    def added(self, base: Tensor, params: Params, scale: float) -> Tensor:
        return base + low_rank.LOW_RANK.delta(base, {name: params[name] for name in NAMES}, scale)


def as_lora(params: Params, scale: float, out_features: int, in_features: int) -> Params:
    """Of twice the rank: B A - B0 A0."""
    A, B, A0, B0 = (params[name].float() for name in (*NAMES, *FIRST))
    return {"lora_A": torch.cat([A, A0]), "lora_B": scale * torch.cat([B, -B0], dim=1)}


def as_pissa(layer: UpstreamLayer) -> Params:
    """As PiSSA, which is the same but for where it starts; RWKV-PEFT's has scale 1."""
    if layer.scale == 1:
        return layer.params
    return {name: layer.scale * tensor if name.endswith("B") else tensor for name, tensor in layer.params.items()}


def step(method: Method, config: AdapterConfig, in_features: int) -> float:
    """Each factor, of the weight's own size, carries the step of the other: together some three times LoRA's."""
    return method.scale(config) * math.sqrt(min(1.0, 3 * config.rank / in_features))


def residual(
    name: str, make: Initial, step: FirstStep = step, most: Callable[[int, int], int] = min, from_gradient: bool = False
) -> Method:
    """The method that starts from the factors of `make`, at a rank of at most most(out, in)."""
    misfit = rank_up_to(most)
    return Method(
        name=name,
        tensors=Tensors(NAMES, ("rank",), shapes, low_rank.sizes, misfit, idle=("lora_A",)),
        change=Difference(
            MappingProxyType({"lora_B": 0, "init_lora_B": 0}), update=update, negated=("lora_B", "init_lora_B")
        ),
        apply=low_rank.apply,
        held=Constants(FIRST, make, keep, from_gradient),
        residual=Residual(training_base, first),
        alpha=Alpha(),
        step=step,
        lora=as_lora,
        upstream=Upstream(as_pissa),
    )


def svd_lowrank(matrix: Tensor, rank: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomized SVD with oversampling, from a seed of its own: the same factors on every run."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, q=min(2 * rank, *matrix.shape), niter=niter)
