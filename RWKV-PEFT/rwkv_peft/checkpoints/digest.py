"""The digest of a whole file. A large file's digest is cached beside it, or in the user's cache if its folder cannot be
written, and holds as long as the file's size and time of change stay the same."""

import hashlib
import json
import os
import time
from pathlib import Path

from ..cli.errors import UserError
from ..cli.names import user_cache
from .atomic import write_text
from .readable import object_in

CHUNK = 1 << 24
KEPT = 1 << 26  # bytes from which a digest is cached: hashing fewer takes no longer than looking for the cache
SETTLED = 2.0  # seconds since a file's last change before its digest is cached: some file systems' clocks are so coarse


def digest_of(path: str | Path) -> str:
    """The first half of the SHA-256 of a file's content, in hexadecimal; "" if there is no file."""
    path = Path(path)
    if not path.is_file():
        return ""
    before = os.stat(path)
    if before.st_size < KEPT:
        return sha256_of(path)[:32]
    stamp = {"bytes": before.st_size, "mtime_ns": before.st_mtime_ns}
    places = places_of(path)
    for place in places:
        if found := kept_in(place, stamp):
            return found
    digest = sha256_of(path)[:32]
    if time.time() - before.st_mtime > SETTLED:
        keep(places, stamp | {"sha256": digest})
    return digest


def digest_below(path: str | Path) -> str:
    """The digest of a file, or of the names and contents of the files directly in a folder; "" if there is neither."""
    path = Path(path)
    if not path.is_dir():
        return digest_of(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return hashlib.sha256("".join(f"{file.name} {digest_of(file)}\n" for file in files).encode()).hexdigest()[:32]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def places_of(path: Path) -> list[Path]:
    """The places for a file's cached digest; the first that can be written is used."""
    real = Path(os.path.realpath(path))
    name = hashlib.sha256(str(real).encode(errors="surrogateescape")).hexdigest()[:32]
    places = [real.with_name(f".{real.name}.digest")]
    cache = user_cache()
    return places if cache is None else [*places, cache / "digests" / f"{name}.json"]


def kept_in(place: Path, stamp: dict[str, int]) -> str:
    """The digest cached in a place for a file with this stamp, or ""."""
    kept = object_in(place)
    digest = kept.pop("sha256", "")
    return digest if isinstance(digest, str) and kept == stamp else ""


def keep(places: list[Path], record: dict[str, object]) -> None:
    """Write a record to the first place that can be written; if none can, the digest is computed again next time."""
    for place in places:
        try:
            write_text(place, json.dumps(record))
            return
        except UserError:
            continue
