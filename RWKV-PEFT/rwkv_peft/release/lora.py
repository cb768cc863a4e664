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
from ..checkpoints.adapter_file import Adapter, save_adapter
from ..checkpoints.atomic import atomic_write
from ..checkpoints.base import Base
from ..checkpoints.peft_folder import write_lora_folder
from ..checkpoints.rwkv_peft_file import write_rwkv_peft
from ..cli.errors import UserError
from ..cli.numeric import all_finite
from .gguf import write_gguf_lora

SAME = 1e-4  # relative errors up to this are float32's own rounding
NITER = 8  # power iterations of the randomized SVD: its error is then within a thousandth of an exact one's


@dataclass(frozen=True)
class LoraForm:
    """An adapter as LoRA, with what the LoRA leaves out.

    adapter is an Adapter of plain LoRA at scale 1; errors {module: |change - B A| / |change|} (Frobenius) of the layers
    that have no exact form; rounding the same of layers whose training rounded the weight less its first factors, {} if
    that is negligible, None if it cannot be measured because no base is given.
    """

    adapter: Adapter
    errors: Mapping[str, float]
    rounding: Mapping[str, float] | None = field(default_factory=dict)


def as_lora(adapter: Adapter, base: Mapping[str, torch.Tensor] | None = None, rank: int = 0) -> LoraForm:
    """Convert an Adapter to LoRA.

    base is {key: tensor} of the model that it was trained on, which all but the LoRA family need; rank is that of the
    LoRA if there is no exact form (0: twice the adapter's). Raises UserError if no layer is adapted, if tensors were
    trained whole, if a residual base was quantized, if the base is missing or does not fit, if tensors do not fit
    together or the change is not finite, or if rank is larger than a layer's or given for an exact form.
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
    factors: dict[str, Params] = {}
    errors = {}
    shapes = {module: layer_shape(method, module, params, base) for module, params in adapter.modules().items()}
    for module, params in adapter.modules().items():
        check_shapes(method, module, params, shapes[module])
        exact = None if method.lora is None else method.lora(params, metadata.scale, *shapes[module])
        if exact is None:
            if not (rank or metadata.rank):
                raise UserError(f"{method.label} has no rank that a LoRA could take: give --lora_rank")
            check_rank(rank, metadata.rank, shapes)
            change = change_of(adapter, module, params, base)
            require_finite(module, change.norm())  # because the SVD needs finite values
            exact, errors[module] = truncated(change, rank or 2 * metadata.rank)
        require_finite(module, *exact.values())
        factors[module] = exact
    if rank and not errors:
        raise UserError(f"--lora_rank {rank}: {method.label} has a LoRA form of its own, which is exact; leave it out")
    tensors = {f"{module}.{name}": tensor for module, params in factors.items() for name, tensor in params.items()}
    width = next(iter(factors.values()))["lora_A"].shape[0]
    told = replace(metadata, variant=METHODS["lora"].name, rank=width, mini_rank=0, entries=0, scale=1.0)
    return LoraForm(
        Adapter(tensors, told), errors, rounding_of(adapter, factors, base) if method.residual is not None else {}
    )


def check_shapes(method: Method, module: str, params: Params, shape: tuple[int, int]) -> None:
    """Raise UserError unless the tensors of a layer, whose weight has `shape` (out, in), have its method's shapes."""
    for name, due in due_shapes(method, params, shape).items():
        if tuple(params[name].shape) != due:
            raise UserError(
                f"{module} holds {name} of shape {tuple(params[name].shape)}, and {due} is due beside its other "
                "tensors; copy the file again"
            )


def due_shapes(method: Method, params: Params, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors on a layer (out, in), at the size of params."""
    return method.tensors.shapes(method.tensors.config(params), *shape)


def require_finite(module: str, *tensors: torch.Tensor) -> None:
    """Raise UserError if tensors computed from a layer's change hold NaN or Inf: the change is beyond float32."""
    if not all(map(all_finite, tensors)):
        raise UserError(
            f"{module}: its change is too large for float32, so that LoRA cannot hold it; the training had diverged: "
            "take an earlier adapter"
        )


def rounding_of(
    adapter: Adapter, factors: Mapping[str, Params], base: Mapping[str, torch.Tensor] | None
) -> Mapping[str, float] | None:
    """Compute LoraForm.rounding for an Adapter whose method takes its first factors out of the weight; factors are the
    LoRA's by module."""
    metadata, errors = adapter.metadata, {}
    if base is None:
        return {} if metadata.base_dtype() == torch.float32 else None
    for module, params in adapter.modules().items():
        assert metadata.method is not None  # because it adapts layers
        weight = base.get(f"{module}.weight")
        if weight is None or tuple(weight.shape) != layer_shape(metadata.method, module, params, None):
            raise UserError(
                f"{module}: the adapter does not fit the base; give --base_model, the model that it was trained on"
            )
        rounded = weight.to(metadata.base_dtype() or weight.dtype)
        change = metadata.method.merged(rounded, params, scale=metadata.scale) - weight.float()
        errors[module] = relative_error(change, factors[module])
    return errors if max(errors.values()) > SAME else {}


def layer_shape(
    method: Method, module: str, params: Params, base: Mapping[str, torch.Tensor] | None
) -> tuple[int, int]:
    """Return (out, in) of a layer from LoRA's own tensors, else from the base."""
    if "lora_A" in params:
        A, B = params["lora_A"], params["lora_B"]
        if A.dim() != 2 or B.dim() != 2:
            raise UserError(
                f"{module} holds lora_A of shape {tuple(A.shape)} and lora_B of shape {tuple(B.shape)}, which are no "
                "two matrices; copy the file again"
            )
        return B.shape[0], A.shape[1]
    weight, own = weight_of(method, module, base), method.parameters[0]
    if due_shapes(method, params, (weight.shape[0], weight.shape[1]))[own] != params[own].shape:
        raise UserError(
            f"{module}: the adapter does not fit the base's weight {tuple(weight.shape)}; give --base_model, the model "
            "that it was trained on"
        )
    return weight.shape[0], weight.shape[1]


def weight_of(method: Method, module: str, base: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """The base's weight of a layer. Raises UserError if there is none."""
    weight = None if base is None else base.get(f"{module}.weight")
    if weight is None:
        raise UserError(
            f"{method.label} as LoRA depends on the layers' weights"
            + (f", and the base has no {module}.weight" if base is not None else "")
            + "; give --base_model, the model that it was trained on"
        )
    return weight


def change_of(adapter: Adapter, module: str, params: Params, base: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """Compute W' - W of a layer in float32, from the weight that the training had. Raises UserError without a base."""
    metadata = adapter.metadata
    assert metadata.method is not None  # because it adapts layers
    weight = weight_of(metadata.method, module, base)
    weight = weight.to(metadata.base_dtype() or weight.dtype)
    weight = roundtrip(weight, metadata.quant) if metadata.quant != "none" else weight.float()
    return metadata.method.change.delta(weight, params, metadata.scale)


def check_rank(given: int, own: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise UserError if the LoRA's rank, the given one or (0) twice the adapter's own, is larger than the narrowest
    side among {module: (out, in)}."""
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
    .safetensors; base is the Base that it is for. Return a phrase on what loads it. Raises UserError for another
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
    """Say in a phrase what a LoraForm leaves out of the change, or that it is exact."""
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
