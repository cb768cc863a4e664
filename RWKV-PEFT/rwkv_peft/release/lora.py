"""Convert adapters to plain LoRA, which more tools read: `rwkv-peft convert ADAPTER OUTPUT --to lora`.

bone and the LoRA family have an exact LoRA form. The change of other methods, such as bat-in's W_ab B_b + B_b, has full
rank: its largest singular values are kept (Eckart and Young 1936), and the rest is reported as an error. PiSSA, OLoRA
and LoRA-GA train on W - scale B0 A0, which --precision bf16 rounds; their LoRA leaves that rounding out, and it is
reported too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..adapters.change import Params
from ..adapters.method import Method
from ..adapters.methods import METHODS
from ..adapters.quant import roundtrip
from ..adapters.residual import svd_lowrank
from ..checkpoints.adapter_file import Adapter, AdapterMetadata, save_adapter
from ..checkpoints.atomic import atomic_write
from ..checkpoints.base import Base
from ..checkpoints.peft_folder import write_lora_folder
from ..checkpoints.rwkv_peft_file import write_rwkv_peft
from ..cli.errors import UserError
from ..cli.names import all_finite
from .compatibility import check_params
from .gguf import write_gguf_lora

SAME = 1e-4  # relative errors up to this are float32's own rounding
NITER = 8  # power iterations of the randomized SVD: its error is then within a thousandth of an exact one's


@dataclass(frozen=True)
class LoraForm:
    """An adapter as LoRA, and the shares of its change that the LoRA leaves out.

    adapter is an Adapter of plain LoRA at scale 1; errors {module: |change - B A| / |change|} (Frobenius) of the layers
    that have no exact form; rounding is the share that training lost by rounding the weight less its first factors,
    {} if that is negligible, None if it cannot be measured because no base is given.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    rounding: Mapping[str, float] | None = field(default_factory=dict)


def as_lora(adapter: Adapter, base: Mapping[str, torch.Tensor] | None = None, rank: int = 0) -> LoraForm:
    """Convert an Adapter to LoRA.

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
    modules = adapter.modules()
    shapes = {module: layer_shape(method, module, params, base) for module, params in modules.items()}
    factors: dict[str, Params] = {}
    errors, rounding = {}, {}
    for module, params in modules.items():
        check_params(module, method, params, shapes[module])
        exact = None if method.lora is None else method.lora(params, metadata.scale, *shapes[module])
        if exact is None:
            check_rank(method, rank, metadata.rank, shapes)
            assert base is not None  # layer_shape needed it
            change = change_of(metadata, method, base[f"{module}.weight"], params)
            require_finite(module, change.norm())  # because the SVD needs finite values
            exact, errors[module] = truncated(change, rank or 2 * metadata.rank)
        require_finite(module, *exact.values())
        factors[module] = exact
        if method.residual is not None and base is not None:
            weight = base[f"{module}.weight"]
            rounded = weight.to(metadata.base_dtype() or weight.dtype)
            change = method.merged(rounded, params, scale=metadata.scale) - weight.float()
            rounding[module] = relative_error(change, exact)
    if rank and not errors:
        raise UserError(f"--lora_rank {rank}: {method.label} has a LoRA form of its own, which is exact; leave it out")
    tensors = {f"{module}.{name}": tensor for module, params in factors.items() for name, tensor in params.items()}
    width = next(iter(factors.values()))["lora_A"].shape[0]
    lora = replace(metadata, variant=METHODS["lora"].name, rank=width, mini_rank=0, entries=0, scale=1.0)
    unmeasured = method.residual is not None and base is None and metadata.base_dtype() != torch.float32
    negligible = max(rounding.values(), default=0.0) <= SAME
    return LoraForm(Adapter(tensors, lora), errors, None if unmeasured else {} if negligible else rounding)


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


def check_rank(method: Method, given: int, own: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError if the LoRA's rank, the given one or (0) twice the adapter's own, is 0, or larger than the
    narrowest side among {module: (out, in)}."""
    if not (given or own):
        raise UserError(f"{method.label} has no rank that a LoRA could take: give --lora_rank")
    narrowest = min(shapes, key=lambda module: min(shapes[module]))
    most = min(shapes[narrowest])
    if (given or 2 * own) > most:
        what = f"--lora_rank {given}" if given else f"the LoRA's rank would be {2 * own}, twice the adapter's, which"
        raise UserError(
            f"{what} is more than the weight {shapes[narrowest]} of {narrowest} allows; give --lora_rank, at most "
            f"{most}"
        )


def truncated(change: torch.Tensor, rank: int) -> tuple[Params, float]:
    """Cut a change (out, in) to its `rank` largest singular values -> ({lora_A, lora_B}, the relative error left)."""
    U, S, V = svd_lowrank(change, rank, NITER)
    root = S[:rank].sqrt()
    factors = {"lora_A": (V[:, :rank] * root).t().contiguous(), "lora_B": (U[:, :rank] * root).contiguous()}
    return factors, relative_error(change, factors)


def relative_error(change: torch.Tensor, factors: Params) -> float:
    """Return |change - B A| / |change| of a change (out, in) and LoRA's factors; 0 if the change is zero."""
    size = change.norm()
    return float((change - factors["lora_B"] @ factors["lora_A"]).norm() / size) if size else 0.0


def write_lora(path: Path, ending: str, form: LoraForm, base: Base | None) -> str:
    """Write a LoraForm in the format of an ending: a folder of peft (""), llama.cpp's .gguf, RWKV-PEFT's .pth or our
    .safetensors; base is the Base that it is for. Return a phrase on its readers. Raises UserError for another
    ending, and for a .gguf without a base."""
    adapter = form.adapter
    if not ending:
        write_lora_folder(path, adapter, "" if base is None else str(base.path))
        return "Hugging Face peft loads it (PeftModel.from_pretrained)"
    if ending == ".gguf":
        if base is None:
            raise UserError(f"{path}: a GGUF names its model's generation; give --base_model")
        with atomic_write(path) as temporary:
            write_gguf_lora(temporary, base.family, adapter.modules())
        return "llama.cpp loads it beside the GGUF of its base (--lora)"
    if ending == ".pth":
        write_rwkv_peft(path, adapter)
        return f"RWKV-PEFT merges it (--lora_alpha {adapter.metadata.alpha:g})"
    if ending == ".safetensors":
        save_adapter(path, adapter.tensors, adapter.metadata)
        return "merge_bone.py and train.py load it"
    raise UserError(f"{path}: LoRA goes into a folder (peft), .gguf (llama.cpp), .pth (RWKV-PEFT) or .safetensors")


def describe_errors(form: LoraForm) -> str:
    """A phrase on the share of the change that a LoraForm leaves out, or on its exactness."""
    if form.errors:
        return f"without {_shares(form.errors, 'of the change')}"
    rounded = "the same change but for the rounding of the base that was trained on"
    if form.rounding is None:
        return f"{rounded}, which --base_model has measured"
    return f"{rounded}, {_shares(form.rounding, 'of it')}" if form.rounding else "the same change, exactly"


def _shares(errors: Mapping[str, float], whole: str) -> str:
    worst = max(errors, key=lambda module: errors[module])
    mean = sum(errors.values()) / len(errors)
    return f"{mean:.1%} {whole} on the mean (Frobenius norm), at the worst {errors[worst]:.1%} ({worst})"
