"""Writes a .pth tensor by tensor, so that a model may be larger than memory; names the dtypes of weights.

`torch.save` wants every tensor at once. A .pth is a zip archive of uncompressed records: a pickle that
names shapes and storages, then each storage's bytes, aligned to 64 bytes so that readers can map
them. If shapes and dtypes are known beforehand, the records can be streamed, each with its checksum.
"""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

DTYPES = MappingProxyType({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32})


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.", such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


ALIGNMENT = 64
LOCAL_HEADER = 30  # bytes before the name in a zip record's header
ZIP64_FIELD = 20  # bytes of the extra field that gives sizes above 4 GB, present in each record here
ROOT = "archive"  # the folder inside the archive, as torch.save names it
CHUNK = 1 << 20  # bytes written at a time, few enough to stay in the core's cache between checksum and write


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
    """Write a flat dict of tensors to `path` as torch.save would, holding only what is being written.

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


def _bytes_of(key: str, spec: TensorSpec, parts: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of a tensor that comes in one or more runs of rows; they must make up what spec says."""
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
