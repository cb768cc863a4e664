"""Reads and writes files of tensors: .pth, which torch.save makes, and .safetensors.

Tensors are read mapped, so that no byte is read before its use, and written one at a time, so that a model may be
larger than memory. Nothing in a file is executed.

A .pth is a zip archive of uncompressed records: a pickle that names shapes and storages, then each storage's bytes,
aligned to 64 bytes so that readers can map them. A .safetensors is eight bytes of header length, a JSON header with
each tensor's dtype, shape and place, then the bytes (https://github.com/huggingface/safetensors#format).
"""

import io
import json
import pickle
import re
import reprlib
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..cli.errors import UserError, short
from .readable import reading, require_file

DTYPES = MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32})
SAFETENSORS_DTYPES = MappingProxyType(
    {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.uint8: "U8"}
)
# Bytes that stream_tensors reads through one mapping; they stay in memory until the next one. Each mapping unpickles
# all tensors' descriptions, which takes 60 ms for a model of 32 layers.
MAPPED = 1 << 28
ALIGNMENT = 64
LOCAL_HEADER = 30  # bytes before the name in a zip record's header
ZIP64_FIELD = 20  # bytes of the extra field that gives sizes above 4 GB, present in each record here
ROOT = "archive"  # the folder inside the archive, as torch.save names it
CHUNK = 1 << 20  # bytes written at a time, few enough to stay in the core's cache between checksum and write


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.", such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def read_pth(path: str | Path) -> Any:
    """The object in a .pth, its tensors mapped from the file.

    Raises UserError for a file that is missing, damaged or foreign, and for a pickle of anything but tensors and plain
    containers, because only those are unpickled (weights_only).
    """
    path = require_file(path)
    check_archive(path)
    with reading(path, "cannot be read as a PyTorch checkpoint"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:  # torch's message advises to load the file without this protection
            if match := re.search(r"GLOBAL (\S+)", str(error)):
                raise UserError(
                    f"{path} holds code or objects ({short(match[1])}), and a checkpoint may hold only tensors; "
                    "nothing of it was run. Ask its author for a plain state dict"
                ) from error
            raise UserError(f"{path} is damaged, or no PyTorch checkpoint; download or copy it again") from error


def check_archive(path: Path) -> None:
    """Raise UserError unless a file is an uncompressed zip archive, with the cause of each common mistake."""
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
    packed = [record.filename for record in records_of(path) if record.compress_type != zipfile.ZIP_STORED]
    if packed:  # it may unpack to any size
        raise UserError(f"{path} is packed ({short(packed[0])}), and a .pth is not; save it with torch.save")


def records_of(path: Path) -> list[zipfile.ZipInfo]:
    """The records of a zip archive. Raises UserError if its directory is damaged."""
    with reading(path, "is damaged"), zipfile.ZipFile(path) as archive:
        return archive.infolist()


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The flat {name: tensor} in a .pth; parameters become plain tensors.

    Raises UserError as read_pth, require_weights and require_records do, and for any other content.
    """
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
        with reading(path, "is damaged"):  # half a surrogate pair is no name that any other file can hold
            key.encode()
    require_weights(state, path)
    require_records(state.values(), path)
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
    """Raise UserError for a tensor that nothing here computes with: not dense, without data, quantized, not of floats
    of 16 or 32 bits, or a view that is negated or larger than its data."""
    for key, tensor in state.items():
        dense = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta or tensor.is_quantized)
        floats = dense and tensor.is_floating_point() and tensor.element_size() in (2, 4) and not tensor.is_neg()
        if not floats or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            kind = dtype_name(tensor.dtype) + ("" if floats or dense else " and not dense")
            raise UserError(
                f"{name}: {key} is {kind}; weights must be dense tensors of bfloat16, float16 or float32, with all "
                "their data and not quantized. Save them so"
            )


def require_records(tensors: Iterable[torch.Tensor], path: Path) -> None:
    """Raise UserError unless each storage of the tensors mapped from a .pth is as long as a record of its own.

    torch takes a storage's length from the pickle, and would complete a shorter record by the bytes behind it.
    """
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)}
    records = Counter(record.file_size for record in records_of(path))
    if beyond := Counter(filter(None, storages.values())) - records:
        raise UserError(
            f"{path} is damaged: a tensor takes {next(iter(beyond)):,} bytes, and no record of that length is left for "
            "it; download or copy it again"
        )


def read_safetensors(path: str | Path, weights: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """({name: tensor}, the header's metadata) of a .safetensors file, mapped, in the order of the bytes.

    Raises UserError as require_weights does, but with weights=False.
    """
    from safetensors import safe_open

    path = require_file(path)
    with reading(path, "is not a readable safetensors file"), safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.offset_keys()}
        metadata = file.metadata() or {}
    if weights:
        if not tensors:
            raise UserError(f"{path} holds no tensor; copy it again")
        require_weights(tensors, path)
    return tensors, metadata


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor yet to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> "TensorSpec":
        return TensorSpec(tuple(tensor.shape), dtype or tensor.dtype)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def write_pth(path: str | Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a flat dict of tensors to `path` as torch.save would, a tensor at a time.

    specs maps each key to its TensorSpec; tensors is an iterable of (key, tensor) in the same order. A tensor may also
    come as several runs of its rows, in consecutive pairs with its key. The file loads with
    torch.load(mmap=True, weights_only=True). `path` is written in place: use atomic_write around it. Raises
    ValueError if a tensor is not the one that specs announced.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        pickled = io.BytesIO()
        pending = {key: _Pending(number, spec) for number, (key, spec) in enumerate(specs.items())}
        _SpecPickler(pickled, protocol=2).dump(pending)
        _write_record(archive, "data.pkl", [pickled.getvalue()])
        _write_record(archive, "byteorder", [sys.byteorder.encode()])
        remaining = groupby(tensors, lambda pair: pair[0])
        for number, (key, spec) in enumerate(specs.items()):
            name, pairs = next(remaining, (None, ()))
            if name != key:
                raise ValueError(f"expected {key}, got {name}")
            _write_record(archive, f"data/{number}", _bytes_of(key, spec, (tensor for _, tensor in pairs)))
        if (extra := next(remaining, None)) is not None:
            raise ValueError(f"a tensor more than announced: {extra[0]}")
        _write_record(archive, "version", [b"3\n"])


def save_pth(
    path: str | Path, tensors: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Write {key: tensor} with write_pth, in the order and dtypes of `dtypes` {key: dtype} (None: in its own)."""
    dtypes = dtypes or {key: tensor.dtype for key, tensor in tensors.items()}
    specs = {key: TensorSpec.of(tensors[key], dtype) for key, dtype in dtypes.items()}
    write_pth(path, specs, ((key, tensors[key].to(dtype)) for key, dtype in dtypes.items()))


def chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor as memoryviews of at most CHUNK bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return (flat[start : start + CHUNK].numpy().data for start in range(0, flat.numel(), CHUNK))


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
        dtype, place = SAFETENSORS_DTYPES[spec.dtype], [offset, end]
        header[key] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": place}
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


def _bytes_of(key: str, spec: TensorSpec, parts: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of a tensor that comes in one or more runs of rows; their shapes must add up to spec's."""
    elements = 0
    for part in parts:
        elements += part.numel()
        if part.dtype != spec.dtype or part.shape[1:] != spec.shape[1:] or elements > spec.numel:
            raise ValueError(
                f"expected {key} {spec}, got {TensorSpec.of(part)} after {elements - part.numel()} elements"
            )
        yield from chunks(part)
    if elements != spec.numel:
        raise ValueError(f"expected {key} {spec}, got {elements} elements")


def _write_record(archive: zipfile.ZipFile, name: str, chunks: Iterable[bytes | memoryview]) -> None:
    info = zipfile.ZipInfo(f"{ROOT}/{name}")  # its default date keeps the bytes of a file reproducible
    assert archive.fp is not None  # it is open
    start = archive.fp.tell() + LOCAL_HEADER + len(info.filename) + ZIP64_FIELD
    padding = -(start + 4) % ALIGNMENT
    # an extra field is a two-byte id, a two-byte length, and that many bytes; torch's own id is "FB"
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as record:
        for chunk in chunks:
            record.write(chunk)


class _Pending:
    """A tensor of the pickle, pickled as the call that rebuilds it from its storage."""

    def __init__(self, number: int, spec: TensorSpec) -> None:
        self.number, self.spec = number, spec

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self.spec.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (
            _Storage(self.number, self.spec),
            0,
            self.spec.shape,
            strides,
            False,
            OrderedDict(),
        )


class _Storage:
    def __init__(self, number: int, spec: TensorSpec) -> None:
        self.number, self.spec = number, spec


class _SpecPickler(pickle.Pickler):
    """Writes a _Storage the way torch.save does: a persistent id that points to a record of the archive."""

    def persistent_id(self, value: object) -> tuple[Any, ...] | None:
        if not isinstance(value, _Storage):
            return None
        name = torch.storage._dtype_to_storage_type_map()[value.spec.dtype]  # such as BFloat16Storage
        return ("storage", getattr(torch, name), str(value.number), "cpu", value.spec.numel)
