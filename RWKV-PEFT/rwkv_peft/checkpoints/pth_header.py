"""Reads the names, shapes and dtypes of a .pth without torch: its import takes longer than a plan."""

import math
import pickle
import zipfile
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

# torch's name of a storage -> (its dtype, bytes of an element)
STORAGES = MappingProxyType({"BFloat16Storage": ("bf16", 2), "HalfStorage": ("fp16", 2), "FloatStorage": ("fp32", 4)})


class TensorHeader(NamedTuple):
    """A tensor's shape, its dtype as --precision names it, and its bytes."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


def rebuilt(storage: tuple[str, int], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    """The TensorHeader by the arguments of torch's _rebuild_tensor_v2. Raises ValueError if its storage is shorter."""
    dtype, item = STORAGES[storage[0]]
    size = item * math.prod(shape)
    if size > item * storage[1]:
        raise ValueError("a tensor is larger than its storage")
    return TensorHeader(tuple(shape), dtype, size)


class HeaderUnpickler(pickle.Unpickler):
    """Unpickles tensors as TensorHeaders, and nothing but them in plain dicts."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuilt
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in STORAGES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, identity: Any) -> tuple[str, int]:
        _, name, _, _, numel = identity  # "storage", its type, key, device, elements
        return name, numel


def read_header(path: str | Path) -> dict[str, TensorHeader] | None:
    """{key: TensorHeader} of a .pth, or None for any other file, and for one with anything but such tensors in it;
    `open_base` raises the reason."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as pickled:
                headers = HeaderUnpickler(pickled).load()
            records = archive.infolist()
    except Exception:  # whatever a damaged archive or pickle raises
        return None
    if not isinstance(headers, dict) or not all(isinstance(header, TensorHeader) for header in headers.values()):
        return None
    stored = {record.file_size for record in records if record.compress_type == zipfile.ZIP_STORED}
    return headers if headers and all(header.nbytes in stored for header in headers.values()) else None
