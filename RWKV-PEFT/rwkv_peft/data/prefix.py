"""The names of the files of a token set, before any token is read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.readable import object_in

ENDINGS = (".bin", ".idx", ".mask", ".weights")  # of the files of a set; the last two only if they say something
SHARDS = "shards"  # of the JSON object in PREFIX.json, which is then a manifest
MOST_SHARDS = 100_000  # of a manifest


def binidx_prefix(path: str | Path) -> str:
    """PREFIX, PREFIX.bin or PREFIX.idx -> PREFIX."""
    text = str(path)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def shard_prefix(prefix: str | Path, number: int) -> str:
    """The prefix of a shard of a set, from number 1 on."""
    return f"{prefix}-{number:05}"


def manifest_of(prefix: str | Path) -> list[Any]:
    """The entries of a set's shards in its PREFIX.json, unchecked; [] if the set is not in shards."""
    found = object_in(binidx_prefix(prefix) + ".json").get(SHARDS)  # recorded.py tells what is wrong with it
    return found if isinstance(found, list) else []


def shard_at(prefix: str | Path, entry: object) -> str:
    """The prefix of the shard that an entry of a manifest names, "" if it names none. A name is that of a file in the
    manifest's folder, or a path from there, so that shards may lie on several disks."""
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return os.path.join(os.path.dirname(binidx_prefix(prefix)), name) if isinstance(name, str) and name else ""


def prefixes_of(prefix: str | Path) -> list[str]:
    """The prefixes of a set's files: those of its shards, or its own."""
    return [shard_at(prefix, entry) for entry in manifest_of(prefix)] or [binidx_prefix(prefix)]


def default_mask(prefix: str | Path) -> str:
    """The --loss_mask of token files if none is given: "file" if they have a .mask file, else "none"."""
    return "file" if any(Path(each + ".mask").is_file() for each in prefixes_of(prefix)) else "none"
