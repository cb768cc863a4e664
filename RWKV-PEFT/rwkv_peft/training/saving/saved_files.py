"""Record the files of a checkpoint in its state.json by size and checksum, and check them, so that damage is found
before any of them is used. CRC-32 finds what disks and copies do; it is no guard against a forger, who can change the
record too."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError, short

OPTIMIZER, DEEPSPEED = "optimizer", "zero"  # folders of the optimizer's state: ours, and that of earlier versions
CHUNK = 1 << 24


def is_of_deepspeed(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is of an earlier version, which kept DeepSpeed's files."""
    return (checkpoint / DEEPSPEED).is_dir()


def record_of(path: Path) -> dict[str, Any]:
    """The record of a file in state.json: {"bytes", "crc32"}."""
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def checksum(path: Path) -> str:
    """The CRC-32 of a file's content, as eight hexadecimal digits."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def check_records(records: Mapping[str, Any]) -> None:
    """Raise ValueError unless each name is a path inside the checkpoint and each size an integer. A record is as
    record_of gives it, or only a size, as earlier versions wrote it."""
    for name, record in records.items():
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"{short(name)} does not lie in it")
        if type(size_of(record)) is not int:
            raise ValueError(f"the size of {short(name)} is no whole number")


def size_of(record: Any) -> Any:
    """The size that a record holds."""
    return record.get("bytes") if isinstance(record, dict) else record


def require_files(checkpoint: Path, records: Mapping[str, Any], fresh_optimizer: bool, contents: bool = False) -> None:
    """Raise UserError for a file of a checkpoint that is missing or of another size than its record says or, with
    `contents`, of another checksum. With fresh_optimizer those of the optimizer's state are not checked."""
    for name, record in records.items():
        path, of_optimizer = checkpoint / name, Path(name).parts[:1] in ((OPTIMIZER,), (DEEPSPEED,))
        if fresh_optimizer and of_optimizer:
            continue
        if not path.is_file() or path.stat().st_size != size_of(record):
            what = f"is missing or not of the {size_of(record):,} bytes that were saved"
        elif contents and isinstance(record, dict) and checksum(path) != record.get("crc32"):
            what = "differs from the file that was saved: its checksum is another, and the disk or a copy damaged it"
        else:
            continue
        raise UserError(
            f"--resume: {path} {what}; delete {checkpoint} to resume from an older checkpoint"
            + (", or add --fresh_optimizer to go on without the optimizer's state" if of_optimizer else "")
        )
