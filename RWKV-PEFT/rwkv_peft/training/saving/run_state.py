"""Write and read a checkpoint's state.json, which records how far a run had come, and check it by its checksum.

The checksum finds what a disk, a copy or an editor changed; it is no guard against a forger, who can write another.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...cli.errors import UserError
from ...cli.numeric import is_whole

OPTIMIZER = "optimizer"  # the folder of the optimizer's state
CHUNK = 1 << 24
STATE = "state.json"
CHECKSUM = "crc32"  # its entry
MOST = 1 << 62  # steps: more than any run counts
COUNTS = ("step", "samples_seen", "step_samples", "validated_from")
KINDS: Mapping[str, type] = MappingProxyType(  # of other entries; earlier versions had not all of them
    {
        **dict.fromkeys(("adapter", "config", "data", "figures", "files"), dict),
        **dict.fromkeys(("groups", "trained"), list),
        **dict.fromkeys(("retained", "validation"), str),
    }
)


def remedy_of(checkpoint: Path, of_optimizer: bool = True) -> str:
    """Say what helps if a checkpoint, or only the optimizer's state in it, is of no use."""
    fresh = ", or add --fresh_optimizer to go on without the optimizer's state" if of_optimizer else ""
    return f"delete {checkpoint} to resume from an older checkpoint{fresh}"


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


def require_files(checkpoint: Path, records: Mapping[str, Any], fresh_optimizer: bool, contents: bool = False) -> None:
    """Raise UserError for a file of a checkpoint that is missing or of another size than its record says or, with
    `contents`, of another checksum. With fresh_optimizer those of the optimizer's state are not checked."""
    for name, record in records.items():
        path, of_optimizer = checkpoint / name, Path(name).parts[:1] == (OPTIMIZER,)
        if fresh_optimizer and of_optimizer:
            continue
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            what = f"is missing or not of the {record['bytes']:,} bytes that were saved"
        elif contents and checksum(path) != record["crc32"]:
            what = "differs from the file that was saved: its checksum is another, and the disk or a copy damaged it"
        else:
            continue
        raise UserError(f"--resume: {path} {what}; {remedy_of(checkpoint, of_optimizer)}")


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state.json with its checksum."""
    path.write_text(json.dumps({**state, CHECKSUM: checksum_of(state)}, indent=1))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint. Raises one of UNREADABLE if it is no JSON object, was changed, or has
    an entry of another kind than runs write."""
    state = json.loads((checkpoint / STATE).read_text())
    if not isinstance(state, dict):
        raise ValueError(f"it is a {type(state).__name__}, and an object is due")
    if state.pop(CHECKSUM, None) != checksum_of(state):
        raise ValueError("it was changed after it was written: its checksum differs")
    odd = [name for name in COUNTS if not is_whole(value := state.get(name, 0), 0) or value >= MOST]
    odd += [name for name, kind in KINDS.items() if type(state.get(name, kind())) is not kind]
    if odd or type(state.get("config", {}).get("train", {})) is not dict:
        raise ValueError(f"its {(odd or ['config'])[0]} is none that a run writes")
    return state


def checksum_of(state: Mapping[str, Any]) -> str:
    """The CRC-32 of a state's entries, as eight hexadecimal digits, however they are laid out in the file."""
    return f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"
