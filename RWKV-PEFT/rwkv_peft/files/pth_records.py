"""Checks that each tensor of a .pth, the zip archive that torch.save writes, has a record of its length.

torch trusts both of a file's tables of contents: the archive's, which says how long a record is, and the pickle's,
which says how many elements a tensor takes. A tensor with a shorter record would also read the bytes behind it.
"""

import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from ..errors import UserError, told


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
