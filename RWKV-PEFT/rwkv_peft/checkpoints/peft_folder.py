"""Adapters in folders of Hugging Face peft, over layers of an RWKV model.

peft's "bat" is bat-out; folders of rwkv_peft.hf's BoneConfig may also have "bat-in".
"""

import json
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..adapters.methods import METHODS, adapter_parameter, by_hf_name
from ..cli.errors import UserError, short
from ..cli.names import NONE, is_finite, is_whole
from ..models import official_key
from .adapter_file import Adapter, AdapterMetadata, Origin, target_names
from .atomic import atomic_write
from .readable import choice_in, read_settings, require_readable
from .tensors import read_safetensors, read_tensors, save_safetensors

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
HF_PREFIX = "base_model.model."
# settings of peft's LoRA with which a layer's change is not B A times one scale for all layers and tokens
NO_PLAIN_LORA = (
    "use_dora lora_bias rank_pattern alpha_pattern layer_replication fan_in_fan_out alora_invocation_tokens use_qalora "
    "use_bdlora monteclora_config kasa_config arrow_config"
).split()
# values of init_lora_weights that leave the base as it is; others take the initial factors out of it
BESIDE_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
ELSEWHERE = "merge it in peft, into the model that it was trained on (merge_and_unload), and take that model"
Number = TypeVar("Number", int, float)


def is_adapter_folder(folder: str | Path) -> bool:
    """Return whether a folder is one, by its adapter_config.json."""
    return (Path(folder) / CONFIG).is_file()


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the settings in a folder's adapter_config.json. Raises UserError if it is missing or cannot be read."""
    path = require_readable(
        Path(folder) / CONFIG,
        f"{folder} has no {CONFIG}, which peft's save_pretrained writes"
        + (choice_in(folder, ".pth", ".safetensors") or "; give a folder of its making, or an adapter's file"),
    )
    return read_settings(path)


def read_folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read a folder's {peft's key: tensor} from its safetensors file or, if there is none, from the torch file that
    safe_serialization=False writes."""
    if (folder / TENSORS).is_file():
        return read_safetensors(folder / TENSORS)[0]
    if (folder / PICKLED).is_file():
        return read_tensors(folder / PICKLED)
    raise UserError(f"{folder} has no {TENSORS} (nor {PICKLED}); is it a folder that peft saved?")


@contextmanager
def replacing(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the temporary paths to write a folder's CONFIG and TENSORS to. They get their names when both are complete.
    An old CONFIG is removed before the tensors change, so that a kill in between leaves a folder that readers refuse,
    not one that mixes old and new."""
    with atomic_write(folder / CONFIG) as config, atomic_write(folder / TENSORS) as tensors:
        yield config, tensors
        (folder / CONFIG).unlink(missing_ok=True)


def read_hf_folder(folder: str | Path) -> Adapter:
    """Read the Adapter in a folder saved by Hugging Face peft: BONE, MISS or plain LORA over layers of an RWKV model.

    Module names are official, or a Hugging Face RWKV model's. Raises UserError for missing files, another
    kind of adapter, and settings that merging cannot honour.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = {}
    for key, tensor in read_folder_tensors(folder).items():
        if not key.startswith(HF_PREFIX):
            raise UserError(f"{folder}: key {key} does not start with {HF_PREFIX!r} as peft's keys do")
        module = key.removeprefix(HF_PREFIX)
        split = adapter_parameter(module)
        tensors[f"{official_key(split[0] + '.')}{split[1]}" if split else official_key(module)] = tensor
    modules = Adapter(tensors, AdapterMetadata(NONE)).modules()
    whole = {key: tensor for key, tensor in tensors.items() if not adapter_parameter(key)}
    common: dict[str, Any] = {
        "targets": target_names(modules),
        "train_parts": tuple(whole),
        "source": f"peft {config.get('peft_version', '')}",
        "origin": Origin(base=_base_name(config)),
    }
    kind = str(config.get("peft_type", "")).upper()
    if kind == "LORA":
        _check_plain_lora(folder, config)
        rank = _number(folder, config, "r", int)
        for module, params in modules.items():
            if "lora_A" in params:
                _check_rank(folder, f"{module}.lora_A", params["lora_A"], 0, rank)
        scale = _number(folder, config, "lora_alpha", float) / (rank**0.5 if config.get("use_rslora") else rank)
        return Adapter(tensors, AdapterMetadata("lora", rank=rank, scale=scale, **common))
    if kind not in ("BONE", "MISS"):
        raise UserError(
            f"{folder} holds a {kind or 'nameless'} adapter of peft, and BONE, MISS and plain LORA are read here; "
            + ELSEWHERE
        )
    parameter = f"{kind.lower()}_block"
    own = {}
    for module, params in modules.items():
        if set(params) != {parameter}:
            raise UserError(f"{folder}: {module} holds {sorted(params)}, and a {kind} adapter has only {parameter}")
        own[f"{module}.bone"] = params[parameter]
    rank = _number(folder, config, "r", int)
    variant = _bone_variant(folder, config, own)
    for key, tensor in own.items():
        _check_rank(folder, f"{key.removesuffix('bone')}{parameter}", tensor, 0 if tensor.dim() == 2 else -1, rank)
    mini_rank = _number(folder, config, "mini_r", int) if variant == "bone-mini" else 0
    return Adapter(own | whole, AdapterMetadata(variant, rank=rank, mini_rank=mini_rank, **common))


def write_lora_folder(folder: Path, adapter: Adapter, base: str) -> None:
    """Write the adapted layers of a plain LoRA Adapter as a folder of Hugging Face peft; base is the path that the
    folder names as its base model."""
    metadata = adapter.metadata
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": metadata.rank,
        "lora_alpha": metadata.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(adapter.modules()),  # full names, because a target would match all layers of its name
        "inference_mode": True,
        "task_type": None,
    }
    tensors = {
        f"{HF_PREFIX}{module}.{name}.weight": tensor
        for module, params in adapter.modules().items()
        for name, tensor in params.items()
    }
    with replacing(folder) as (config, weights):
        config.write_text(json.dumps(settings, indent=2) + "\n")
        save_safetensors(weights, tensors)


def _base_name(config: dict[str, Any]) -> str:
    """The base's name on the hub, or the last part of an absolute path; "" if it has none that can be printed."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name.isprintable():
        return ""
    return Path(name).name if Path(name).is_absolute() else short(name)


def _number(folder: Path, config: dict[str, Any], name: str, kind: type[Number]) -> Number:
    """Read a setting. Raises UserError unless it is a finite number above 0, whole if kind is int, no boolean."""
    value: Any = config.get(name)
    if not (is_whole(value, 1) if kind is int else is_finite(value) and value > 0):
        raise UserError(
            f"{folder}: adapter_config.json has {name} = {reprlib.repr(value)}, and a finite number above 0 is due; "
            "copy the file that peft saved"
        )
    return value


def _check_rank(folder: Path, key: str, tensor: torch.Tensor, axis: int, rank: int) -> None:
    """Raise UserError if a tensor's axis is not as wide as the r of adapter_config.json."""
    if tensor.dim() and tensor.shape[axis] != rank:
        raise UserError(
            f"{folder}: {key} has shape {tuple(tensor.shape)}, and r is {rank} in adapter_config.json: the two files "
            "belong to different adapters"
        )


def _bone_variant(folder: Path, config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The canonical name of a BONE or MISS adapter's form, by init_weights and the dimensions of its tensors."""
    dims = {tensor.dim() for tensor in tensors.values()}
    if len(dims) != 1 or not dims <= {2, 3}:
        raise UserError(f"{folder}: its tensors have {sorted(dims)} dimensions; 2 or 3 are due throughout")
    init, dim = config.get("init_weights", True), dims.pop()
    # pre-releases of peft have only block affine Bone, and no name for it
    method = by_hf_name("bat" if isinstance(init, bool) and dim == 3 else init)
    if method is None:
        forms = [method.hf for method in METHODS.values() if method.hf is not None]
        known = [name for form in forms for name in form.names if isinstance(name, str)]
        raise UserError(
            f"{folder}: init_weights is {reprlib.repr(init)} in adapter_config.json; known are true, false and "
            f"{', '.join(known)}"
        )
    assert method.hf is not None  # by_hf_name found it by that
    if dim != method.hf.dims:
        raise UserError(
            f"{folder}: init_weights {init!r} goes with tensors of {method.hf.dims} dimensions, and these have {dim}: "
            "adapter_config.json belongs to another adapter"
        )
    return method.name


def _check_plain_lora(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError for LoRA settings with which the trained model is not W + scale B A over the original base."""
    odd = [name for name in NO_PLAIN_LORA if config.get(name)]
    remedy = ELSEWHERE
    if not odd and config.get("init_lora_weights", True) not in BESIDE_THE_BASE:
        odd = [f"init_lora_weights={reprlib.repr(config['init_lora_weights'])}, which changes the base"]
        remedy = "save it again in peft as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
    if odd:
        raise UserError(f"{folder}: this LoRA uses {', '.join(odd)}, and only plain LoRA is read here; {remedy}")
