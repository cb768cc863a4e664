"""Checks a .pth before torch reads it: what its pickles name, and that each tensor has a record of its length.

torch's restricted reader runs no code of a file, but it calls functions that allocate as much memory as their arguments
say, such as `bytearray(6_000_000_000)`, and it allocates tensors before it has seen their bytes. So each pickle is
first read with inert objects in place of what it names, and refused if it names anything that tensors do not need.
torch also trusts both of a file's tables of contents: the archive's, which says how long a record is, and the pickle's,
which says how many elements a tensor takes. A tensor with a shorter record would also read the bytes behind it.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from ..cli.errors import UNREADABLE, UserError, short, told

# Names that a pickle may call: those that rebuild tensors, and plain containers.
BUILDERS = frozenset(
    (
        "collections.OrderedDict collections.Counter builtins.set builtins.complex _codecs.encode "
        "torch.Size torch.device torch.serialization._get_layout torch.nn.parameter.Parameter "
        "torch._tensor._rebuild_from_type_v2 torch._utils._rebuild_parameter "
        "torch._utils._rebuild_parameter_with_state torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 "
        "torch._utils._rebuild_tensor_v3 torch._utils._rebuild_sparse_tensor torch._utils._rebuild_nested_tensor "
        "torch._utils._rebuild_meta_tensor_no_storage"
    ).split()
)
QUANTIZED = "torch._utils._rebuild_qtensor"
# Exceptions that readers raise for files that are no checkpoints: they assume that the pickle's instructions fit
# together, that functions get arguments that fit, and that they can read the archive.
NO_CHECKPOINT = (
    *UNREADABLE,
    RuntimeError,
    EOFError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    ImportError,
    MemoryError,
)


class Nothing:
    """An inert object in place of what a pickle would make by a call; it accepts any arguments, state and items."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


class Judge(pickle.Unpickler):
    """Reads a pickle and makes only plain containers. Raises UserError for a name that tensors do not need."""

    def __init__(self, path: Path, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled), encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str) -> object:
        whole = f"{module}.{name}"
        if whole in BUILDERS:
            return Nothing
        is_dtype = isinstance(getattr(torch, name, None), torch.dtype)
        if module in ("torch", "torch.storage") and (name == "Tensor" or name.endswith("Storage") or is_dtype):
            return whole  # a text, which cannot be called: a call of a tensor or storage type allocates
        if whole == QUANTIZED:
            raise UserError(
                f"{self.path} holds quantized tensors; weights are bfloat16, float16 or float32. Save them so"
            )
        raise UserError(
            f"{self.path} holds code or objects ({short(whole)}), and a checkpoint may hold only tensors; nothing of "
            "it was run. Ask its author for a plain state dict"
        )

    def persistent_load(self, identity: object) -> Nothing:
        return Nothing()


def judge(path: Path) -> None:
    """Raise UserError for an archive of torch.save whose pickle names more than tensors and plain containers, or one of
    NO_CHECKPOINT if the archive has no pickle or a damaged one."""
    pickled = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    for operation, argument, _ in pickletools.genops(pickled):
        # the unpickler would allocate for as many
        if operation.name == "LONG_BINPUT" and isinstance(argument, int) and argument > len(pickled):
            raise ValueError(f"it remembers {argument:,} objects")
    Judge(path, pickled).load()


def record_sizes(path: str | Path) -> Counter[int]:
    """Count the records of the archive at `path` by their bytes. Raises UserError for a record that is compressed
    (torch.save's never are, and it may unpack to any size) or longer than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            records, size = archive.infolist(), Path(path).stat().st_size
    except (zipfile.BadZipFile, ValueError, NotImplementedError, LookupError) as error:
        raise UserError(f"{path} is damaged ({told(error)}); download or copy it again") from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise UserError(
                f"{path} is packed, and a .pth is not: {record.filename} says that it unpacks to {record.file_size:,} "
                "bytes; unpack it, and save it with torch.save"
            )
        if record.file_size > size:
            raise UserError(
                f"{path} is damaged: {record.filename} would have {record.file_size:,} bytes, and the file has "
                f"{size:,}; download or copy it again"
            )
    return Counter(record.file_size for record in records)


def require_records(path: str | Path, tensors: Iterable[torch.Tensor]) -> None:
    """Raise UserError unless each storage of the tensors mapped from `path` is as long as a record of its own."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(torch.Tensor.untyped_storage, tensors)}
    beyond = Counter(filter(None, storages.values())) - record_sizes(path)
    if beyond:
        raise UserError(
            f"{path} is damaged: a tensor takes {next(iter(beyond)):,} bytes, and no record of that length is left for "
            "it; download or copy it again"
        )
