"""Reads .safetensors files, and writes them tensor by tensor, so that a model may be larger than memory.

The format: eight bytes of header length, a JSON header with each tensor's dtype, shape and place, then the
bytes (https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..cli.errors import UserError
from .pth import require_file, require_weights
from .pth_writer import TensorSpec, chunks

MOST = 100_000  # tensors of a file: no model has as many, and a million take a minute


def read_safetensors(path: str | Path, weights: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a .safetensors file: ({name: tensor}, the header's metadata). The tensors are mapped, in the file's
    order; they must be weights unless that is not asked."""
    from safetensors import SafetensorError, safe_open

    path = require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if len(names) > MOST:
                raise UserError(f"{path} holds {len(names):,} tensors; at most {MOST:,} are read, so give another file")
            tensors = {key: file.get_tensor(key) for key in names}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}; copy it again") from error
    if weights:
        if not tensors:
            raise UserError(f"{path} holds no tensor; copy it again")
        require_weights(tensors, path)
    return {key: tensors[key] for key in stored_order(path)}, metadata


def stored_order(path: Path) -> list[str]:
    """The names in a whole .safetensors file, in the order of their bytes; the library lists them by name."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def write_safetensors(
    path: str | Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a flat dict of tensors to `path`, holding one at a time.

    specs maps each key to its TensorSpec; tensors is an iterable of (key, tensor) in the same order;
    metadata a dict of strings. `path` is written in place: use atomic_write around it.
    """
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    offset = 0
    for key, spec in specs.items():
        end = offset + spec.numel * spec.dtype.itemsize
        header[key] = {"dtype": _dtype_name(spec.dtype), "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, spec), (name, tensor) in zip(specs.items(), tensors, strict=True):
            if name != key or TensorSpec.of(tensor) != spec:
                raise ValueError(f"expected {key} {spec}, got {name}")
            for chunk in chunks(tensor):
                file.write(chunk)


def save_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write {key: tensor} with write_safetensors, in its own order."""
    specs = {key: TensorSpec.of(tensor) for key, tensor in tensors.items()}
    write_safetensors(path, specs, tensors.items(), metadata)


def _dtype_name(dtype: torch.dtype) -> str:
    floats = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    return {**floats, torch.uint8: "U8"}[dtype]
