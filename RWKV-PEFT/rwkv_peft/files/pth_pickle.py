"""The pickles of a .pth, judged before torch reads them.

torch's restricted reader runs no code of a file, but it calls functions that make room for what their arguments say,
such as `bytearray(6_000_000_000)`, and it makes room for tensors before it has seen their bytes. So each pickle is
first read with nothing behind its names, and refused for a name that is not needed to put tensors together.
"""

import io
import mmap
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

from ..errors import UserError, short

# What may be called: what puts tensors together, and plain containers.
BUILDERS = frozenset(
    (
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "builtins.complex",
        "_codecs.encode",
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.nn.parameter.Parameter",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_nested_tensor",
        "torch._utils._rebuild_meta_tensor_no_storage",
    )
)
QUANTIZED = "torch._utils._rebuild_qtensor"
BARE = 5  # pickles of a file from before torch 1.6: a number, a version, the system's widths, the object, its storages
OBJECT = 3  # the first of them that is the user's
# What readers raise for files that are no checkpoints: they trust the pickle's instructions to fit together, the
# functions that they call to get arguments that fit, and the archive to be one that they can read.
UNREADABLE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    OSError,
    ImportError,
    MemoryError,
)


class Nothing:
    """Stands for what a pickle would make by a call, and takes whatever is put into it."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


class Judge(pickle.Unpickler):
    """Reads a pickle and makes nothing of it but plain containers. Raises UserError for names of other things than
    tensors take; `elements` adds up the sizes of the storages that it names."""

    def __init__(self, path: Path, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled), encoding="bytes")
        self.path = path
        self.storages: dict[object, int] = {}
        self.allowed = BUILDERS | {f"{cls.__module__}.{cls.__qualname__}" for cls in added_classes()}

    def find_class(self, module: str, name: str) -> object:
        whole = f"{module}.{name}"
        if whole in self.allowed:
            return Nothing
        if module in ("torch", "torch.storage") and (name == "Tensor" or name.endswith("Storage") or is_dtype(name)):
            return whole  # which nothing can call: a tensor or storage that is called makes room
        if whole == QUANTIZED:
            raise UserError(
                f"{self.path} holds quantized tensors; weights are bfloat16, float16 or float32. Save them so"
            )
        raise UserError(
            f"{self.path} holds code or objects besides tensors ({short(whole)}), which a checkpoint must not; nothing "
            "of it was run. Ask its author for a plain state dict"
        )

    def persistent_load(self, identity: Any) -> Nothing:
        """A storage: ("storage", type, key, device, number of elements)."""
        self.storages[identity[2]] = int(identity[4])
        return Nothing()

    @property
    def elements(self) -> int:
        return sum(self.storages.values())


def judge_zipped(path: Path) -> None:
    """Raise UserError for an archive of torch.save whose pickle calls for more than tensors and plain containers, or
    one of UNREADABLE if torch's own reader finds none."""
    pickled = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    scan(path, io.BytesIO(pickled), len(pickled))
    Judge(path, pickled).load()


def judge_bare(path: Path) -> None:
    """Raise UserError for a file of bare pickles that call for more than tensors and plain containers, or for more than
    the file holds, or one of UNREADABLE if it is no such file."""
    size = os.path.getsize(path)
    # a file that is mapped gives as many bytes as it has, and a plain one makes room for as many as a pickle names
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for place in range(BARE):
            begin = mapped.tell()
            largest = scan(path, cast(IO[bytes], mapped), size)
            if place < OBJECT:
                continue
            judge = Judge(path, mapped[begin : mapped.tell()])
            judge.load()
            if (needed := max(largest, judge.elements)) > size:
                raise UserError(
                    f"{path} is damaged: it names a size of {short(str(needed))}, and has {size:,} bytes; download or "
                    "copy it again"
                )


def scan(path: Path, pickled: IO[bytes], size: int) -> int:
    """Go through a pickle's instructions and carry out none; -> the largest number in them. Raises ValueError where
    they end too early or are none, and for a place beyond `size` among the objects to remember, for which the
    unpickler would make room."""
    largest = 0
    for operation, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, int):
            largest = max(largest, argument)
            if operation.name == "LONG_BINPUT" and argument > size:
                raise ValueError(f"it remembers {argument:,} objects")
    return largest


def added_classes() -> Iterator[Any]:
    """The classes that torch was told of, as for DeepSpeed's files (training/optimizer_files.py)."""
    for item in torch.serialization.get_safe_globals():
        yield item[0] if isinstance(item, tuple) else item


def is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)
