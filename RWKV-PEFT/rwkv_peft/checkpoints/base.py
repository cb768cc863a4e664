"""Base models: opens a model's file safely and once, checks it, fingerprints its weights, and writes one."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from ..adapters.methods import adapter_parameter
from ..cli.errors import UserError
from ..cli.names import ADAPTER, MODEL, all_finite
from ..config import ModelConfig
from ..models import family_of
from ..models.family import Family
from ..models.state import is_time_state
from .atomic import atomic_write
from .best import take
from .hf_folder import read_hf_model
from .tensors import read_safetensors, read_tensors, save_pth

WINDOWS, WINDOW = 4, 16  # a fingerprint reads this many runs of this many values in each tensor

# (ending of a file's name, what it is)
OTHER_FORMATS = (
    (".safetensors", "a safetensors file"),
    (".st", "a safetensors file of web-rwkv"),
    (".gguf", "a GGUF file"),
)

AS_ADAPTER = (
    "as --adapter of generate and eval, as --bone_checkpoint of merge and check, or as --bone_load "
    "(lora_load, pissa_load) of train.py"
)


@dataclass(frozen=True)
class Base:
    """A model's file: its path, memory-mapped tensors under official keys, generation (family), dimensions (config)."""

    path: str | Path
    tensors: dict[str, torch.Tensor]
    family: Family
    config: ModelConfig

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.tensors)

    def require_finite(self) -> None:
        """Raise UserError if any value is NaN or Inf, with the place of the first one; read every value."""
        for key, tensor in self.tensors.items():
            if not all_finite(tensor):
                place = torch.isfinite(tensor).logical_not().nonzero()[0].tolist()
                raise UserError(
                    f"{self.path} is not finite: {key} holds NaN or Inf, at {place} first; download or copy it again, "
                    "or take an earlier checkpoint of its training"
                )

    @property
    def has_states(self) -> bool:
        """True if the model holds tuned time states."""
        return any(map(is_time_state, self.tensors))

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of all 2-D weights: {module name: (out, in)}."""
        return linear_shapes({key: tuple(tensor.shape) for key, tensor in self.tensors.items()})


def linear_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """The shapes of all 2-D weights among {key: shape}: {module name: (out, in)}."""
    weights = {key: shape for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2}
    return {key.removesuffix(".weight"): (shape[0], shape[1]) for key, shape in weights.items()}


def open_base(path: str | Path) -> Base:
    """Open the .pth, or the folder of a Hugging Face model, at `path` as a Base.

    Raises UserError as read_tensors does, and for the folder of a run; another format; another RWKV version; prefixed
    keys; adapter tensors that were never merged; missing, extra or misshapen tensors; a dtype that is not a float.
    """
    if (Path(path) / MODEL).is_file():
        raise UserError(f"{path} is the folder of a run; give the model that it trained, {take(Path(path)).path}")
    if (Path(path) / ADAPTER).is_file():
        raise UserError(
            f"{path} is the folder of a run, which holds an adapter and no base model; give it {AS_ADAPTER}, and the "
            "base that it was trained on here"
        )
    kind = next((kind for ending, kind in OTHER_FORMATS if str(path).endswith(ending)), None)
    if (Path(path) / "config.json").is_file():
        base = base_of(read_hf_model(Path(path)), path)
        return replace(base, tensors={key: base.tensors[key] for key in base.family.shapes(base.config)})
    if kind == "a GGUF file":
        raise UserError(f"{path} is {kind}, and a .pth is due here; give the .pth that it was made from")
    if kind == "a safetensors file" and any(adapter_parameter(key) for key in read_safetensors(path)[0]):
        raise UserError(
            f"{path} is an adapter, not a base model; give it {AS_ADAPTER}, and the base that it was trained on here"
        )
    if kind:
        raise UserError(
            f"{path} is {kind}, and a .pth is due here; make one of a model with `rwkv-peft convert {path} model.pth`"
        )
    return base_of(read_tensors(path), path)


def base_of(tensors: dict[str, torch.Tensor], name: str | Path = "the checkpoint") -> Base:
    """The Base of {key: tensor}. Raises UserError unless it is a complete model and nothing else."""
    leftover = [key for key in tensors if adapter_parameter(key)]
    if leftover:
        whole = "emb.weight" in tensors
        raise UserError(
            f"{name} holds {len(leftover)} adapter tensors (such as {leftover[0]}), "
            + (
                "which were never merged and which runtimes ignore without a word; take the base model's own "
                "file, and merge the adapter with merge_bone.py"
                if whole
                else f"so it is an adapter, not a base model; give it {AS_ADAPTER}"
            )
        )
    family = family_of(tensors, name)
    return Base(name, tensors, family, family.check(tensors, name))


def save_model(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a model's {key: tensor} as a .pth, atomically. Raises UserError if the file cannot be written."""
    with atomic_write(path) as temporary:
        save_pth(temporary, tensors)


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """A short name for a base model's weights, {key: tensor}, which an adapter records.

    It is the first half of a SHA-256 over each tensor's key, shape and four evenly spaced runs of 16 values as float32,
    in any order of the keys. So it reads only a few pages of each tensor of a mapped file, and an exact float32 copy of
    a bfloat16 model has the same fingerprint. It guards against mistakes, not against forgery.
    """
    digests = []
    for key, tensor in state.items():
        flat = tensor.detach().reshape(-1)
        last = max(flat.numel() - WINDOW, 0)
        starts = (last * i // (WINDOWS - 1) for i in range(WINDOWS))
        values = torch.cat([flat[start : start + WINDOW] for start in starts]).float().cpu()
        content = f"{key}|{tuple(tensor.shape)}|".encode() + values.numpy().tobytes()
        digests.append(hashlib.sha256(content).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:32]
