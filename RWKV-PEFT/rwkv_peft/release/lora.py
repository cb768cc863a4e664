"""Convert adapters to plain LoRA, which more tools read: `rwkv-peft convert ADAPTER OUTPUT --to lora`.

bone and the LoRA family have an exact LoRA form. The change of other methods, such as bat-in's W_ab B_b + B_b, has full
rank: its largest singular values are kept (Eckart and Young 1936), and the rest is reported as an error. PiSSA, OLoRA
and LoRA-GA train on W - scale B0 A0, which --precision bf16 rounds; their LoRA leaves that rounding out.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from ..adapters.change import Params
from ..adapters.method import Method
from ..adapters.methods import METHODS
from ..adapters.quant import roundtrip
from ..adapters.residual import svd_lowrank
from ..checkpoints.adapter_file import Adapter, AdapterMetadata
from ..cli.errors import UserError
from ..cli.names import all_finite
from .compatibility import check_params

NITER = 8  # power iterations of the randomized SVD: its error is then within a thousandth of an exact one's


def lora_form(
    adapter: Adapter, base: Mapping[str, torch.Tensor] | None = None, rank: int = 0
) -> tuple[Adapter, dict[str, float]]:
    """An Adapter as plain LoRA at scale 1, and {module: |change - B A| / |change|} (Frobenius) of the layers that have
    no exact form.

    base is {key: tensor} of the model that it was trained on, which all but the LoRA family need; rank is the LoRA's if
    there is no exact form (0: twice the adapter's). Raises UserError if no layer is adapted, if tensors were trained
    whole, if a residual base was quantized, if the base is missing or does not fit, if the change is not finite, or if
    rank is larger than a layer's or given for an exact form.
    """
    metadata, method = adapter.metadata, adapter.metadata.method
    if method is None:
        raise UserError("it has no adapted layer, and LoRA holds nothing else; merge it with merge_bone.py")
    if method.residual is not None and metadata.quant != "none":
        raise UserError(
            f"{method.label} on a base that was quantized after factors were taken out of it is no LoRA on any base; "
            "merge it with merge_bone.py"
        )
    if whole := adapter.whole():
        raise UserError(
            f"{len(whole)} tensors of the base trained along (such as {next(iter(whole))}), and LoRA has no place for "
            "them; merge it with merge_bone.py"
        )
    tensors: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    for module, params in adapter.modules().items():
        shape = layer_shape(method, module, params, base)
        check_params(module, method, params, shape)
        factors = None if method.lora is None else method.lora(params, metadata.scale, *shape)
        if factors is None:
            assert base is not None  # layer_shape needed it
            factor_rank = rank or 2 * metadata.rank
            if factor_rank > min(shape):
                raise UserError(
                    f"a LoRA of rank {factor_rank} is more than the weight {shape} of {module} allows; give "
                    f"--lora_rank, at most {min(shape)}"
                )
            change = change_of(metadata, method, base[f"{module}.weight"], params)
            require_finite(module, change.norm())  # because the SVD needs finite values
            factors, errors[module] = truncated(change, factor_rank)
        require_finite(module, *factors.values())
        tensors |= {f"{module}.{name}": tensor for name, tensor in factors.items()}
        width = len(factors["lora_A"])
    if rank and not errors:
        raise UserError(f"--lora_rank {rank}: {method.label} has a LoRA form of its own, which is exact; leave it out")
    lora = replace(metadata, variant=METHODS["lora"].name, rank=width, mini_rank=0, scale=1.0)
    return Adapter(tensors, lora), errors


def layer_shape(
    method: Method, module: str, params: Params, base: Mapping[str, torch.Tensor] | None
) -> tuple[int, ...]:
    """(out, in) of a layer, from the base, or without one from LoRA's own tensors."""
    if base is not None:
        if (weight := base.get(f"{module}.weight")) is None:
            raise UserError(
                f"{module}: the adapter does not fit the base; give --base_model, the model that it was trained on"
            )
        return tuple(weight.shape)
    if "lora_A" not in params:
        raise UserError(
            f"{method.label} as LoRA depends on the layers' weights; give --base_model, the model that it was trained "
            "on"
        )
    return (*params["lora_B"].shape[:1], *params["lora_A"].shape[-1:])


def change_of(metadata: AdapterMetadata, method: Method, weight: torch.Tensor, params: Params) -> torch.Tensor:
    """Compute W' - W of a layer in float32, from the weight (out, in) that the training had."""
    weight = weight.to(metadata.base_dtype() or weight.dtype)
    weight = roundtrip(weight, metadata.quant) if metadata.quant != "none" else weight.float()
    return method.change.delta(weight, params, metadata.scale)


def require_finite(module: str, *tensors: torch.Tensor) -> None:
    """Raise UserError if tensors computed from a layer's change hold NaN or Inf: the change is beyond float32."""
    if not all(map(all_finite, tensors)):
        raise UserError(
            f"{module}: its change is too large for float32, so that LoRA cannot hold it; the training had diverged: "
            "take an earlier adapter"
        )


def truncated(change: torch.Tensor, rank: int) -> tuple[Params, float]:
    """Cut a change (out, in) to its `rank` largest singular values -> ({lora_A, lora_B}, the relative error left)."""
    U, S, V = svd_lowrank(change, rank, NITER)
    root = S[:rank].sqrt()
    factors = {"lora_A": (V[:, :rank] * root).t().contiguous(), "lora_B": (U[:, :rank] * root).contiguous()}
    size = change.norm()
    error = float((change - factors["lora_B"] @ factors["lora_A"]).norm() / size) if size else 0.0
    return factors, error


def describe_errors(method: Method, errors: Mapping[str, float]) -> str:
    """A phrase on the share of a method's change that its LoRA leaves out, or on its exactness."""
    if errors:
        worst = max(errors, key=lambda module: errors[module])
        mean = sum(errors.values()) / len(errors)
        share = f"{mean:.1%} of the change on the mean (Frobenius norm), at the worst {errors[worst]:.1%} ({worst})"
        return f"without {share}"
    if method.residual is not None:
        return "the same change, but for the rounding of the base that was trained on"
    return "the same change, exactly"
