"""Reads .pth files safely: only tensors, memory-mapped, with an error of its own for each kind of damage."""

import os
import pickle
import reprlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..cli.errors import UserError, told
from .pth_pickle import NO_CHECKPOINT, judge, record_sizes, require_records
from .pth_writer import dtype_name
from .readable import require_readable

# Bytes that stream_tensors reads through one mapping; they stay in memory until the next one. Each mapping unpickles
# all tensors' descriptions, which takes 60 ms for a model of 32 layers.
MAPPED = 1 << 28
SHARED = 2  # tensors may take so many times their file's size: an embedding that is also the head is no mistake


def read_pth(path: str | Path) -> Any:
    """Read the object in a .pth. Its tensors are mapped from the file, so that no byte is read before its use.

    Code in the pickle is never run (weights_only). Raises UserError for a missing file, a folder, an empty, truncated
    or foreign file, and a pickle that holds anything but tensors and plain containers.
    """
    path = require_file(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path} is empty; download or copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from")
    if head.startswith(b"\x80"):
        raise UserError(f"{path} is a bare pickle, as torch before 1.6 wrote it; save it anew with torch.save")
    if not head.startswith(b"PK"):
        raise UserError(f"{path} is not a PyTorch checkpoint (it is no zip archive)")
    if not zipfile.is_zipfile(path):  # the directory of a zip stands at its end
        raise UserError(f"{path} is truncated: its end is missing; download or copy it again")
    record_sizes(path)  # refuses compressed records
    try:
        judge(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or no PyTorch checkpoint; download or copy it again") from error
    except NO_CHECKPOINT as error:
        raise UserError(
            f"{path} cannot be read as a PyTorch checkpoint: {told(error)}; download or copy it again"
        ) from error


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the flat dict {name: tensor} in a .pth; parameters become plain tensors. Raises UserError as read_pth,
    require_weights, require_own_bytes and require_records do, and for any other content."""
    path = Path(path)
    state = read_pth(path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, and a dict of tensors is due")
    if not state:
        raise UserError(f"{path} holds an empty dict")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path} is not a flat dict of tensors: entry {reprlib.repr(key)} is of type {type(value).__name__}; "
                "if the weights are nested in it, save that inner dict as a .pth of its own"
            )
        if not key.isascii() and key != key.encode("utf-8", "replace").decode():
            raise UserError(f"{path}: the name {key!r} is no Unicode text; the file is damaged, copy it again")
    require_weights(state, path)
    require_own_bytes(state, path)
    require_records(path, state.values())
    return {key: tensor.detach() for key, tensor in state.items()}


def stream_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the (key, tensor) pairs of a .pth in file order, in bounded memory.

    The file is mapped anew every MAPPED bytes, so that pages already read leave the process's memory once nothing
    holds their tensors.
    """
    state, taken = read_tensors(path), 0
    for key in list(state):
        if taken > MAPPED:
            state, taken = read_tensors(path), 0
        tensor = state[key]
        taken += tensor.numel() * tensor.element_size()
        yield key, tensor
        del tensor  # it would keep the mapping alive beyond its turn


def require_weights(state: Mapping[str, torch.Tensor], name: str | Path) -> None:
    """Raise UserError for a tensor that nothing here computes with: sparse, nested, without data, quantized, not of
    floats, of less than 16 bits, a negated view, or a view larger than its data (it could take any memory)."""
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else "sparse"
        elif tensor.is_meta:
            kind = "without its data (on the meta device)"
        elif tensor.is_quantized or not tensor.is_floating_point() or tensor.element_size() < 2:
            kind = dtype_name(tensor.dtype)
        elif tensor.is_neg():
            kind = "a negated view"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            kind = "a view that repeats its values"
        else:
            continue
        raise UserError(
            f"{name}: {key} is {kind}; weights must be dense tensors of bfloat16, float16 or float32, not quantized. "
            "Save them so"
        )


def require_own_bytes(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise UserError if tensors share their bytes, so that they take more than SHARED times the file's size."""
    taken, size = sum(tensor.numel() * tensor.element_size() for tensor in state.values()), os.path.getsize(path)
    if taken > SHARED * size:
        raise UserError(
            f"{path}: its tensors take {taken:,} bytes, and the file has {size:,}: some share their bytes; save a copy "
            "of each (tensor.clone())"
        )


def require_file(path: str | Path) -> Path:
    """Return `path` as a Path. Raises UserError unless it is a file, not a pipe or device, that can be read."""
    return require_readable(path, f"{path} does not exist; check the name", again=True)
