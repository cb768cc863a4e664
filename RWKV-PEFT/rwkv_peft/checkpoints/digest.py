"""The digest of a whole file. A large file's digest is cached in the user's cache folder, and is valid as long as the
file's size and time of change stay the same."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from ..cli.errors import UserError
from ..cli.names import user_cache
from .atomic import write_text
from .readable import object_in

CHUNK = 1 << 24
LARGE = 1 << 26  # bytes from which a digest is cached: hashing fewer takes no longer than reading the cache
SETTLED = 2.0  # seconds since a file's last change before its digest is cached: some file systems' clocks are so coarse


def digest_of(path: str | Path) -> str:
    """The first half of the SHA-256 of a file's content, in hexadecimal; "" if there is no file."""
    path, cache = Path(path), user_cache()
    if not path.is_file():
        return ""
    size, changed = path.stat().st_size, path.stat().st_mtime_ns
    if size < LARGE or cache is None:
        return sha256_of(path)[:32]
    name = hashlib.sha256(os.path.realpath(path).encode(errors="surrogateescape")).hexdigest()[:32]
    place, stamp = cache / "digests" / f"{name}.json", {"bytes": size, "mtime_ns": changed}
    cached = object_in(place)
    digest = cached.pop("sha256", None)
    if isinstance(digest, str) and cached == stamp:
        return digest
    digest = sha256_of(path)[:32]
    if time.time() - changed / 1e9 > SETTLED:
        with suppress(UserError):  # a cache that cannot be written costs time alone
            write_text(place, json.dumps(stamp | {"sha256": digest}))
    return digest


def digest_below(path: str | Path) -> str:
    """The digest of a file, or of the names and contents of the files directly in a folder; "" if there is neither."""
    path = Path(path)
    if not path.is_dir():
        return digest_of(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return hashlib.sha256("".join(f"{file.name} {digest_of(file)}\n" for file in files).encode()).hexdigest()[:32]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
