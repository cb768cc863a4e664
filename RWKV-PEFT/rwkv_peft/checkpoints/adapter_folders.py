"""Adapters in folders of Hugging Face peft and of rwkv_lightning_cuda, over layers of an RWKV model.

peft's "bat" is bat-out; folders of rwkv_peft.hf's BoneConfig may also have "bat-in".

rwkv_lightning_cuda serves MiSS on an RWKV-7, beside a model that is never merged: adapter.json describes the layers,
and adapter.pth holds each layer's D (out, rank) in 16 bits, under `blocks.N.att.key.weight.D`. With S, the sums of
inputs with equal numbers modulo the rank, it computes y = W x + scale D S, which is bone with Dᵀ
(https://github.com/Alic-Li/rwkv_lightning_cuda, src/miss). Its trainer of 2026 writes one file, adapter-final.pth, with
the manifest in the archive; D is bfloat16 or float16. Its checkpoints' training.pth are such files too: the manifest
says `tensor_source: master`, and D is the float32 master.
"""

import hashlib
import json
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch

from ..adapters.methods import METHODS, adapter_parameter, by_hf_name
from ..cli.errors import UserError, quoted, short
from ..cli.names import NONE, all_finite, is_finite, is_whole
from ..models import official_key
from .adapter_file import Adapter, AdapterMetadata, Origin, target_names
from .atomic import atomic_write
from .base import Base
from .digest import sha256_of
from .readable import choice_in, read_settings, reading, require_readable
from .tensors import ROOT, chunks, dtype_name, read_safetensors, read_tensors, records_of, save_pth, save_safetensors

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
HF_PREFIX = "base_model.model."
MANIFEST, WEIGHTS = "adapter.json", "adapter.pth"  # of rwkv_lightning_cuda, with its form
EMBEDDED, MOST_MANIFEST = "miss.json", 8 << 20  # the same manifest in a .pth, and the most bytes that it may have
FORM = (("format_version", 1), ("method", "miss"), ("kind", "inference_adapter"), ("layout", "modulo_rank_zero_pad"))
SERVED = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")  # the layers that it adapts
MOST_RANK = 1024
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


def read_config(folder: Path) -> dict[str, Any]:
    """Read the settings in a folder's adapter_config.json. Raises UserError if it is missing or cannot be read."""
    missing = choice_in(folder, ".pth", ".safetensors") or "; give a folder of its making, or an adapter's file"
    return read_settings(
        require_readable(folder / CONFIG, f"{folder} has no {CONFIG}, which peft's save_pretrained writes{missing}")
    )


def read_hf_folder(folder: Path) -> Adapter:
    """Read the Adapter in a folder saved by Hugging Face peft: BONE, MISS or plain LORA over layers of an RWKV model.

    The tensors are in a safetensors file or, if there is none, in the torch file that safe_serialization=False writes.
    Module names are official, or a Hugging Face RWKV model's. Raises UserError for missing files, another kind of
    adapter, and settings that merging cannot honour.
    """
    config = read_config(folder)
    if (folder / TENSORS).is_file():
        found = read_safetensors(folder / TENSORS)[0]
    elif (folder / PICKLED).is_file():
        found = read_tensors(folder / PICKLED)
    else:
        raise UserError(f"{folder} has no {TENSORS} (nor {PICKLED}); is it a folder that peft saved?")
    tensors = {}
    for key, tensor in found.items():
        if not key.startswith(HF_PREFIX):
            raise UserError(f"{folder}: key {key} does not start with {HF_PREFIX!r} as peft's keys do")
        module = key.removeprefix(HF_PREFIX)
        split = adapter_parameter(module)
        tensors[f"{official_key(split[0] + '.')}{split[1]}" if split else official_key(module)] = tensor
    adapter = Adapter(tensors, AdapterMetadata(NONE))
    modules, whole = adapter.modules(), adapter.whole()
    common: dict[str, Any] = {
        "targets": target_names(modules),
        "train_parts": tuple(whole),
        "source": f"peft {config.get('peft_version', '')}",
        "origin": Origin(base=_base_name(config)),
    }
    kind = str(config.get("peft_type", "")).upper()
    if kind not in ("BONE", "MISS", "LORA"):
        raise UserError(
            f"{folder} holds a {kind or 'nameless'} adapter of peft, and BONE, MISS and plain LORA are read here; "
            + ELSEWHERE
        )
    rank = _number(folder, config, "r", int)
    if kind == "LORA":
        _check_plain_lora(folder, config)
        for module, params in modules.items():
            if "lora_A" in params and params["lora_A"].shape[:1] != (rank,):
                shape = tuple(params["lora_A"].shape)
                raise UserError(
                    f"{folder}: {module}.lora_A has shape {shape}, and r is {rank} in {CONFIG}: the two files belong "
                    "to different adapters"
                )
        scale = _number(folder, config, "lora_alpha", float) / (rank**0.5 if config.get("use_rslora") else rank)
        return Adapter(tensors, AdapterMetadata("lora", rank=rank, scale=scale, **common))
    parameter = f"{kind.lower()}_block"
    adapter_tensors = {}
    for module, params in modules.items():
        if set(params) != {parameter}:
            raise UserError(f"{folder}: {module} holds {sorted(params)}, and a {kind} adapter has only {parameter}")
        adapter_tensors[f"{module}.bone"] = params[parameter]
    variant = _bone_variant(folder, config, adapter_tensors)
    mini_rank = _number(folder, config, "mini_r", int) if variant == "bone-mini" else 0
    return Adapter(adapter_tensors | whole, AdapterMetadata(variant, rank=rank, mini_rank=mini_rank, **common))


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
    with atomic_write(folder / CONFIG) as config, atomic_write(folder / TENSORS) as weights:
        config.write_text(json.dumps(settings, indent=2) + "\n")
        save_safetensors(weights, tensors)
        (folder / CONFIG).unlink(missing_ok=True)  # so that a kill leaves no settings beside other tensors


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


def _bone_variant(folder: Path, config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The canonical name of a BONE or MISS adapter's form, by init_weights and the dimensions of its tensors."""
    dims = {tensor.dim() for tensor in tensors.values()}
    init = config.get("init_weights", True)
    # pre-releases of peft have only block affine Bone, and no name for it
    method = by_hf_name("bat" if isinstance(init, bool) and dims == {3} else init)
    if method is None or method.hf is None or dims != {method.hf.dims}:
        known = [f"{', '.join(map(str, form.hf.names))} ({form.hf.dims})" for form in METHODS.values() if form.hf]
        raise UserError(
            f"{folder}: init_weights is {reprlib.repr(init)} in {CONFIG}, and its tensors have {sorted(dims)} "
            f"dimensions; known are {', '.join(known)}: the two files belong together only in one of these forms"
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


def is_lightning(path: str | Path) -> bool:
    """Return whether a path is an adapter of rwkv_lightning_cuda: a folder by the names of its files, a .pth by the
    manifest inside."""
    path = Path(path)
    if path.is_dir():
        return (path / MANIFEST).is_file() and (path / WEIGHTS).is_file()
    return path.suffix == ".pth" and zipfile.is_zipfile(path) and any(map(_embeds, records_of(path)))


def _embeds(record: zipfile.ZipInfo) -> bool:
    return PurePosixPath(record.filename).name == EMBEDDED


def read_lightning(path: Path) -> Adapter:
    """Read a folder or a .pth as a bone Adapter: the same numbers, in float32 with the scale in them if that is not 1.
    Of a training's checkpoint these are the masters. Raises UserError for another format, and for tensors that the
    manifest does not describe."""
    weights, manifest_path = (path / WEIGHTS, path / MANIFEST) if path.is_dir() else (path, path)
    manifest = read_settings(manifest_path) if path.is_dir() else _embedded(path)
    for name, expected in FORM:
        if (value := manifest.get(name)) != expected:
            raise UserError(
                f"{manifest_path}: {name} is {quoted(value)}, and {expected!r} is read here; merge it where it is from"
            )
    rank, scale = manifest.get("rank"), manifest.get("scale")
    if not is_whole(rank) or not is_finite(scale) or scale == 0:
        pair = short(f"rank = {rank!r} and scale = {scale!r}")
        raise UserError(f"{manifest_path} has {pair}, and two finite numbers other than 0 are due; copy it again")
    tensors = read_tensors(weights)
    ending = ".weight.D"
    if manifest.get("tensor_source") == "master":  # beside each: its gradient, and two moments of the optimizer
        tensors = {key.removesuffix(".master"): tensor for key, tensor in tensors.items() if key.endswith(".D.master")}
    if not tensors or not all(tensor.shape[1:] == (rank,) and key.endswith(ending) for key, tensor in tensors.items()):
        raise UserError(f"{path}: not all tensors of {weights.name} are D of rank {rank}; copy it again")
    adapter_tensors = {key.removesuffix(ending) + ".bone": tensor.t().contiguous() for key, tensor in tensors.items()}
    if scale != 1:
        adapter_tensors = {key: tensor.float() * scale for key, tensor in adapter_tensors.items()}
    names = target_names(key.removesuffix(".bone") for key in adapter_tensors)
    metadata = AdapterMetadata("bone", rank=rank, targets=names, generation="x070", source="rwkv_lightning_cuda")
    return Adapter(adapter_tensors, metadata)


def _embedded(path: Path) -> dict[str, Any]:
    """The manifest inside a .pth. Raises UserError if it is damaged."""
    record = next(filter(_embeds, records_of(path)))
    if record.file_size > MOST_MANIFEST:
        raise UserError(f"{path}: its {EMBEDDED} has {record.file_size:,} bytes; at most {MOST_MANIFEST:,} are read")
    with reading(path, f"has a damaged {EMBEDDED}"), zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read(record))
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: its {EMBEDDED} holds no settings; copy it again")
    return manifest


def write_lightning(path: Path, adapter: Adapter, base: Base) -> str:
    """Write a bone Adapter that fits a base's file as rwkv_lightning_cuda's adapter-final.pth -> the dtype of D.

    D stays bfloat16 if all its tensors are, else it is rounded to float16, in which its runtime computes. Its loader
    compares two digests: base_fingerprint, the SHA-256 of the base's file, and content_version, that of the manifest
    without it and of D's bytes, in the manifest's order. It digests the manifest as jsoncpp writes it: sorted keys, no
    blanks. jsoncpp writes fractions in a form of its own, so alpha and scale are whole.
    """
    metadata, modules, whole = adapter.metadata, adapter.modules(), adapter.whole()
    if metadata.variant != "bone" or whole or metadata.quant != "none":
        raise UserError(
            "rwkv_lightning_cuda serves bone on a base as it is, and this adapter is "
            f"{metadata.variant}, of quant {metadata.quant}, with {len(whole)} tensors trained whole; merge it with "
            "merge_bone.py"
        )
    strangers = [module for module in modules if ".".join(module.split(".")[2:]) not in SERVED]
    if strangers or base.family.version != "x070" or metadata.rank > MOST_RANK:
        raise UserError(
            f"rwkv_lightning_cuda adapts {', '.join(SERVED)} of an RWKV-7 at ranks up to {MOST_RANK}, and this is of "
            f"rank {metadata.rank} and adapts {', '.join(target_names(strangers or modules))} of an "
            f"{base.family.name}; merge it with merge_bone.py"
        )
    if not Path(base.path).is_file():
        raise UserError(f"{base.path}: rwkv_lightning_cuda compares the base's file; give the .pth that it serves")
    kinds = {params["bone"].dtype for params in modules.values()}
    dtype = torch.bfloat16 if kinds == {torch.bfloat16} else torch.float16
    factors = {f"{module}.weight.D": params["bone"].t().to(dtype) for module, params in modules.items()}  # (out, rank)
    if not all(map(all_finite, factors.values())):
        raise UserError("it holds values beyond float16, in which rwkv_lightning_cuda computes; merge it instead")
    targets = [
        {
            "name": key,
            "layer": int(key.split(".")[1]),
            "target": ".".join(key.split(".")[2:-1]),
            "in_features": base.tensors[key.removesuffix(".D")].shape[1],
            "shape": list(factor.shape),
        }
        for key, factor in factors.items()
    ]
    manifest = dict(FORM) | {
        "dtype": dtype_name(dtype),
        "rank": metadata.rank,
        "alpha": metadata.rank,
        "scale": 1,
        "base_fingerprint": sha256_of(Path(base.path)),
        "targets": targets,
    }
    digest = hashlib.sha256(_jsoncpp(manifest))
    for factor in factors.values():
        for chunk in chunks(factor):
            digest.update(chunk)
    with atomic_write(path) as temporary:
        save_pth(temporary, factors)
        with zipfile.ZipFile(temporary, "a") as archive:
            record = zipfile.ZipInfo(f"{ROOT}/{EMBEDDED}")  # its default date keeps the bytes of a file reproducible
            archive.writestr(record, _jsoncpp(manifest | {"content_version": digest.hexdigest()}))
    return dtype_name(dtype)


def _jsoncpp(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()
