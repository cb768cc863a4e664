"""Write and read a checkpoint's state.json, which records how far a run had come; check its checksum and its entries.

The checksum finds what a disk, a copy or an editor changed; it is no guard against a forger, who can write another.
"""

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import UserError, short

OPTIMIZER, DEEPSPEED = "optimizer", "zero"  # folders of the optimizer's state: ours, and that of earlier versions
CHUNK = 1 << 24
Kind = type | tuple[Any] | Callable[[Any], bool]  # of an entry, as is_of reads it
STATE = "state.json"
CHECKSUM = "crc32"  # its entry; earlier versions wrote none
MOST = 1 << 62  # samples, steps, bytes: more than any run counts
# errors of reading JSON that is not what a run writes
UNREADABLE = (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError)
DUE: Mapping[str, Kind] = MappingProxyType(
    {
        "samples_seen": int,
        "trained": (str,),
        "adapter": dict,
        "base": str,
        "strategy": str,
        "world_size": int,
        "precision": str,
    }
)


def remedy_of(checkpoint: Path, of_optimizer: bool = True) -> str:
    """Say what helps if a checkpoint, or only the optimizer's state in it, is of no use."""
    fresh = ", or add --fresh_optimizer to go on without the optimizer's state" if of_optimizer else ""
    return f"delete {checkpoint} to resume from an older checkpoint{fresh}"


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
        raise UserError(f"--resume: {path} {what}; {remedy_of(checkpoint, of_optimizer)}")


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state.json with its checksum."""
    path.write_text(json.dumps({**state, CHECKSUM: checksum_of(state)}, indent=1))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint. Raises one of UNREADABLE if it is no JSON object, or was changed."""
    state = json.loads((checkpoint / STATE).read_text())
    if not isinstance(state, dict):
        raise ValueError(f"it is a {type(state).__name__}, and an object is due")
    checksum = state.pop(CHECKSUM, None)
    if checksum is not None and checksum != checksum_of(state):
        raise ValueError("it was changed after it was written: its checksum differs")
    return state


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read and check the state.json of a checkpoint. Raises one of UNREADABLE, also for a missing or wrong entry."""
    state = load_state(checkpoint)
    for name in DUE:
        if name not in state:
            raise ValueError(f"it has no {name}")
    check(state, {**DUE, **MAY_BE})
    return state


def checksum_of(state: Mapping[str, Any]) -> str:
    """The CRC-32 of a state's entries, as eight hexadecimal digits, however they are laid out in the file."""
    return f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"


def check(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Raise ValueError for a value that is not of its name's kind."""
    for name, kind in kinds.items():
        if name in values and not is_of(kind, values[name]):
            raise ValueError(f"its {name} is not of the kind that a run writes")


def is_of(kind: Kind, value: Any) -> bool:
    """Tell whether a value of JSON is of a kind: int (a count), str, dict, (kind,) for a list, or a function."""
    if isinstance(kind, tuple):
        return isinstance(value, list) and all(is_of(kind[0], item) for item in value)
    if kind is int:
        return type(value) is int and 0 <= value < MOST
    return isinstance(value, kind) if isinstance(kind, type) else kind(value)


def is_rate(value: object) -> bool:
    """Tell whether a value is a finite number, a switch, or None, which means that it was left to be chosen."""
    return value is None or isinstance(value, int | float) and math.isfinite(value)


def is_positive(value: object) -> bool:
    """Tell whether a value is a count of at least 1."""
    return is_of(int, value) and value != 0


def are_records(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    check_records(value)
    return True


def are_settings(value: object) -> bool:
    """Tell whether a value is the config of a run, whose settings that are read again are as a run writes them."""
    if not isinstance(value, dict) or not isinstance(train := value.get("train", {}), dict):
        return False
    check(train, dict.fromkeys(("lr_init", "lr_final", "weight_decay", "layerwise_lr", "state_lr"), is_rate))
    check(train, {"random_seed": int})
    return True


def are_figures(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(number, int | float) for number in value.values())


MAY_BE: Mapping[str, Kind] = MappingProxyType(  # entries that some versions did not write
    {
        "files": are_records,
        "optim": str,
        "data": dict,
        "validated_from": int,
        "validation": str,
        "retained": str,
        "groups": ((str,),),
        "figures": are_figures,
        "step_samples": is_positive,
        "row_groups": is_positive,
        "config": are_settings,
    }
)
