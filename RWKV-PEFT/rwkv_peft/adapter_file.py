"""Adapter files: safetensors that hold the trained tensors and say what they are.

An adapter's own tensors keep their module's name and a parameter name beside it
(`blocks.0.att.receptance.bone`, `….lora_A`, `….lora_B`); tensors of the base that were trained whole
keep the base's key (`blocks.0.ln1.weight`). Time states (`blocks.0.att.time_state`) are (H, N value,
N key), as every RWKV file has them.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from .atomic import atomic_write
from .config import ADAPTER_METHODS, BONE_MODES, QUANTIZATIONS, to_json
from .errors import UserError
from .safetensors_reader import read_safetensors

FORMAT_VERSION = 1
METADATA_KEY = "rwkv_peft"  # the entry of the safetensors header that holds AdapterMetadata as JSON
# Parameter names that adapters of any tool add to a module; none of them occurs in a base model.
PARAMETERS = (
    "bone",
    "disha",
    "bone_block",
    "miss_block",
    "lora_A",
    "lora_B",
    "init_lora_A",
    "init_lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
DTYPES = (("bf16", torch.bfloat16), ("fp32", torch.float32))  # by --precision, in which a run keeps its base
# what AdapterMetadata.variant may be: each form of Bone and each other method, "none" being whole tensors alone
VARIANTS = (*BONE_MODES, *(method for method in ADAPTER_METHODS if method not in ("bone", "lora-plus")))


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter is, so that merging needs no retyped flags.

    variant is a name in ADAPTERS ("none": whole tensors alone); rank and mini_rank as in AdapterConfig;
    scale multiplies lora_B lora_A; targets and train_parts say what was trained; quant how the frozen
    weights were quantized; base_fingerprint names the base ("" where the file does not say), and precision what it was
    cast to for training, before anything was quantized or taken out of it ("": nothing, or not told); config is the
    AdapterConfig as JSON; source the tool whose file it was.
    """

    variant: str
    rank: int = 0
    mini_rank: int = 0
    scale: float = 1.0
    targets: tuple[str, ...] = ()
    train_parts: tuple[str, ...] = ()
    quant: str = "none"
    base_fingerprint: str = ""
    precision: str = ""
    config: str = "{}"
    source: str = "rwkv_peft"
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_config(cls, config, base_fingerprint="", precision=""):
        """Metadata of an adapter that was made with an AdapterConfig."""
        return cls(
            variant=config.variant,
            rank=config.rank,
            mini_rank=config.mini_rank,
            scale=config.scale,
            targets=tuple(config.targets),
            train_parts=tuple(config.train_parts),
            quant=config.quant,
            base_fingerprint=base_fingerprint,
            precision=precision,
            config=to_json(config),
        )

    def base_dtype(self):
        """The dtype that `precision` names; None where it names none."""
        return dict(DTYPES).get(self.precision)


class Adapter(NamedTuple):
    """tensors: name -> tensor, as in the module's docstring; metadata: AdapterMetadata."""

    tensors: dict
    metadata: AdapterMetadata

    def modules(self):
        """{module name: {parameter name: tensor}} of the adapter's own tensors."""
        modules = {}
        for key, tensor in self.tensors.items():
            if split := adapter_parameter(key):
                modules.setdefault(split[0], {})[split[1]] = tensor
        return modules

    def whole(self):
        """{base key: tensor} of the tensors that replace the base's."""
        return {key: tensor for key, tensor in self.tensors.items() if not adapter_parameter(key)}


def adapter_parameter(key):
    """("blocks.0.att.key", "bone") for an adapter's own tensor, None for any other key."""
    parts = key.split(".")
    for position, part in enumerate(parts):
        if part in PARAMETERS:
            return ".".join(parts[:position]), part
    return None


def target_names(modules):
    """("blocks.0.att.key", …) -> ("att.key", …), each once, in order."""
    return tuple(dict.fromkeys(".".join(module.split(".")[-2:]) for module in modules))


def save_adapter(path, tensors, metadata):
    """Write {name: tensor} and AdapterMetadata to a .safetensors file, atomically.

    Raises UserError for a disk that is full or closed, ValueError for a tensor that is not finite.
    """
    from safetensors.torch import save_file

    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds NaN or Inf; an adapter with it is of no use, so nothing is written")
    plain = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    header = {"format": "pt", METADATA_KEY: json.dumps(asdict(metadata), sort_keys=True)}
    with atomic_write(path) as temporary:
        save_file(plain, temporary, header)


def read_adapter(path, mode=None, base=None, init=None, alpha=None):
    """The Adapter in a file or folder: ours, or another tool's (see foreign.py and foreign_hf.py).

    mode is a Bone variant for files that do not name theirs, base a state dict whose shapes may tell the variant;
    init and alpha are the initial factors (a path) and LoRA's alpha for files of RWKV-PEFT's LoRA and PiSSA, which
    hold neither. Raises UserError: a file that is missing, broken, of a later format or no adapter; a
    variant that contradicts mode or cannot be told; init or alpha beside a file that says otherwise; a tensor with NaN
    or Inf.
    """
    from .foreign import read_rwkv_peft
    from .foreign_hf import read_hf_folder

    path = Path(path)
    if path.is_dir():
        adapter = read_hf_folder(path)
    elif path.suffix == ".safetensors":
        adapter = _read_safetensors(path)
    else:
        adapter = read_rwkv_peft(path, mode, base, init, alpha)
    _check_lora_flags(path, adapter, init, alpha)
    if mode is not None and adapter.modules() and adapter.metadata.variant != mode:
        raise UserError(f"{path} is a {adapter.metadata.variant} adapter, not {mode}; leave --bone_mode out")
    for key, tensor in adapter.tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{path}: {key} holds NaN or Inf: the training that wrote it had diverged; take an earlier one"
            )
    return adapter


def _check_lora_flags(path, adapter, init, alpha):
    """Refuse init for a file that holds its own factors, if any, and an alpha that is not the adapter's."""
    metadata = adapter.metadata
    if init is not None and (path.is_dir() or path.suffix == ".safetensors"):
        raise UserError(
            f"--lora_init {init} is for RWKV-PEFT's PiSSA files, and {path} lacks nothing of the kind; leave it out"
        )
    if alpha is None or not adapter.modules():
        return
    if metadata.variant in BONE_MODES:
        raise UserError(f"--lora_alpha {alpha:g} is LoRA's, and {path} is a {metadata.variant} adapter; leave it out")
    if not math.isclose(alpha, metadata.scale * metadata.rank):
        raise UserError(
            f"--lora_alpha {alpha:g} contradicts {path}, which was trained with {metadata.scale * metadata.rank:g} "
            f"(scale {metadata.scale:g}, rank {metadata.rank}); leave it out"
        )


def _read_safetensors(path):
    tensors, header = read_safetensors(path)
    if METADATA_KEY not in header:
        hint = (
            "its folder with adapter_config.json"
            if any("base_model." in key for key in tensors)
            else "an adapter that train.py saved"
        )
        raise UserError(f"{path} does not say which adapter it holds (its header has no {METADATA_KEY!r}); give {hint}")
    return Adapter(tensors, _parse_metadata(path, header[METADATA_KEY]))


def _parse_metadata(path, text):
    try:
        values = json.loads(text)
        version = int(values["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its metadata cannot be read: {error!r}") from error
    known = {field.name for field in fields(AdapterMetadata)}
    if version > FORMAT_VERSION or set(values) - known:
        raise UserError(
            f"{path} has adapter format {version}, and this version reads up to {FORMAT_VERSION}; update this package"
        )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    _check_metadata(path, values)
    return AdapterMetadata(**values)


def _check_metadata(path, values):
    """Raise UserError unless metadata names a variant and quantization known here, and has numbers where they are
    due."""

    def refuse(name, due):
        raise UserError(
            f"{path}: its metadata has {name} = {values.get(name)!r}, and {due} is due; copy the file that the "
            "training wrote"
        )

    precisions = ("", *(name for name, _ in DTYPES))
    for name, known, default in (
        ("variant", VARIANTS, None),
        ("quant", QUANTIZATIONS, "none"),
        ("precision", precisions, ""),
    ):
        if values.get(name, default) not in known:
            refuse(name, "one of " + ", ".join(filter(None, known)))
    for name in ("rank", "mini_rank"):
        if type(values.get(name, 0)) is not int or values.get(name, 0) < 0:
            refuse(name, "a whole number")
    scale = values.get("scale", 1.0)
    if type(scale) not in (int, float) or not math.isfinite(scale):
        refuse("scale", "a finite number")
    for name in ("targets", "train_parts"):
        if not isinstance(values.get(name, ()), tuple) or not all(
            isinstance(item, str) for item in values.get(name, ())
        ):
            refuse(name, "a list of names")
    for name in ("base_fingerprint", "config", "source"):
        if not isinstance(values.get(name, ""), str):
            refuse(name, "a text")


@torch.no_grad()
def load_adapter_into(model, adapter, name="the adapter"):
    """Copy an Adapter's tensors into a model whose layers are injected already; returns the names loaded.

    Every adapter parameter of the model must be in the file, and every tensor of the file in the model,
    with its shape; tensors that train whole keep the base's values where the file has none.
    Raises UserError otherwise, before anything is copied.
    """
    parameters = dict(model.named_parameters())
    parameters |= {key: buffer for key, buffer in model.named_buffers() if adapter_parameter(key)}
    own = [key for key in parameters if adapter_parameter(key)]
    missing = [key for key in own if key not in adapter.tensors]
    unexpected = [key for key in adapter.tensors if key not in parameters]
    if not adapter.tensors or (own and len(missing) == len(own)):
        raise UserError(
            f"{name} matches nothing in the model: it holds {_some(list(adapter.tensors))}, and the model "
            f"awaits {_some(own)}; check --peft, --bone_mode and which model it was trained on"
        )
    if missing or unexpected:
        raise UserError(
            f"{name} does not fit the model: "
            + "; ".join(
                f"{len(keys)} tensors {what} ({_some(keys)})"
                for keys, what in ((missing, "missing from the file"), (unexpected, "without a place in the model"))
                if keys
            )
            + "; use the same --peft, targets and --bone_mode as in its training"
        )
    for key, tensor in adapter.tensors.items():
        if tensor.shape != parameters[key].shape:
            raise UserError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(parameters[key].shape)}; use the rank and mode of its training, on the same base"
            )
    for key, tensor in adapter.tensors.items():
        parameters[key].copy_(tensor)
    return list(adapter.tensors)


def _some(keys, limit=3):
    return (", ".join(keys[:limit]) + (", …" if len(keys) > limit else "")) or "nothing"
