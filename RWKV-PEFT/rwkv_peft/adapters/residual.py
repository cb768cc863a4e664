"""LoRA that starts from factors of the weight or of its gradient, which it takes out of the weight.

PiSSA, OLoRA and LoRA-GA train on the base W - scale B0 A0, so that the layer begins where the model was; the factors go
into the adapter file, and merging starts from the original weight.
"""

import torch

from ..config import AdapterConfig
from .lora import Lora
from .method import Layer, Params, Shapes, cast


class ResidualLora(Lora):
    """W' = W + scale (B A - B0 A0), with A0 = `init_lora_A` and B0 = `init_lora_B`."""

    constants = ("init_lora_A", "init_lora_B")
    residual = True

    def first_step(self, config: AdapterConfig, in_features: int) -> float | None:
        return None  # its factors are as large as what was taken out of the weight

    def shapes(self, rank: int, mini_rank: int, out_features: int, in_features: int) -> Shapes:
        shapes = super().shapes(rank, mini_rank, out_features, in_features)
        return shapes | {f"init_{name}": shape for name, shape in shapes.items()}

    def begin(self, layer: Layer, constants: Params) -> None:
        with torch.no_grad():
            for name in self.parameters:
                factor = constants[f"init_{name}"].to(layer.weight.device, layer.weight.dtype).contiguous()
                getattr(layer, name).copy_(factor)
                layer.register_buffer(f"init_{name}", factor, persistent=False)
        # The storage may be the memory-mapped base file's, which others still read: replaced, not written to.
        params = {name: getattr(layer, name) for name in self.constants}
        layer.weight.data = self.training_base(layer.weight.detach(), params, layer.scale)

    def first(self, params: Params) -> Params | None:
        return {**params, **{name: params[f"init_{name}"] for name in self.parameters}}

    def training_base(self, weight: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
        change = scale * (params["init_lora_B"].float() @ params["init_lora_A"].float())
        return (weight.float() - change).to(weight.dtype)

    def merged_with(self, base: torch.Tensor, params: Params, scale: float) -> torch.Tensor:
        return base + super().delta(base, {name: params[name] for name in self.parameters}, scale)

    def delta(self, weight: torch.Tensor, params: Params, scale: float = 1.0) -> torch.Tensor:
        params = cast(params, weight.dtype)
        return super().delta(weight, params, scale) - scale * (params["init_lora_B"] @ params["init_lora_A"])

    def as_lora(self, params: Params, scale: float, out_features: int, in_features: int) -> Params | None:
        """Of twice the rank: B A - B0 A0."""
        A, B, A0, B0 = (params[name].float() for name in (*self.parameters, *self.constants))
        return {"lora_A": torch.cat([A, A0]), "lora_B": scale * torch.cat([B, -B0], dim=1)}

    def for_rwkv_peft(self, module: str, params: Params, scale: float, weight: torch.Tensor | None) -> Params:
        """As PiSSA, which is the same but for where it starts; RWKV-PEFT's has scale 1."""
        if scale == 1:
            return params
        return {name: scale * tensor if name.endswith("B") else tensor for name, tensor in params.items()}


def svd_lowrank(matrix: torch.Tensor, rank: int, niter: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Randomized SVD with oversampling, from a seed of its own: the same factors on every run."""
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, q=min(2 * rank, *matrix.shape), niter=niter)
