"""Opens what holds rows and texts: compressed files and archives, whose sizes are bounded, and office documents.

A compressed file is read as a stream. An archive is unpacked into a folder, which is then read as any other.
"""

import bz2
import gzip
import io
import json
import lzma
import shutil
import stat
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, cast

from ..checkpoints.readable import reading
from ..children import python_command
from ..cli.errors import UserError, in_line, short, summarize
from ..cli.installing import how_to_install

BLOCK = 1 << 20  # bytes that are read at a time
PACKED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", *(f".tar{ending}" for ending in PACKED))
SHEETS = (".xlsx", ".ods")
DOCUMENTS = (".docx", ".odt", ".rtf", ".epub", ".html", ".htm")  # of which pandoc makes a text
RATIO, FLOOR = 100, 1 << 26  # a file may unpack to FLOOR bytes, or to RATIO times its size: rows shrink to a tenth
MOST_FILES = 100_000  # of an archive
MEMORY, SECONDS = 4 << 30, 600  # bytes and time for the program that reads an office document


class Stream(io.RawIOBase):
    """A file of the bytes that an iterator yields."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = memoryview(block)
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def buffered(blocks: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(Stream(blocks), BLOCK)


def packing_of(path: Path) -> str:
    """The ending of PACKED that a name has, or ""."""
    return path.suffix.lower() if path.suffix.lower() in PACKED else ""


def kind_of(path: Path) -> str:
    """The ending of a name in lower case, that of an archive, or the one before the ending of a compressed file."""
    name = path.name.lower()
    archive = next((ending for ending in ARCHIVES if name.endswith(ending)), "")
    return archive or Path(name.removesuffix(packing_of(path))).suffix


def opened(path: Path) -> io.BufferedReader:
    """A file's bytes, unpacked. Raises UserError while they are read if it unpacks to more than it may."""
    packing = packing_of(path) or ".gz" * (path.suffix.lower() == ".tgz")
    if not packing:
        return cast(io.BufferedReader, open(path, "rb", BLOCK))
    if packing == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(f"{path}: .zst needs pyarrow ({summarize(error)}): pip install --upgrade pyarrow") from None
        file = cast(BinaryIO, pyarrow.CompressedInputStream(open(path, "rb"), "zstd"))
    else:
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        file = openers[packing](path, "rb")
    return buffered(bounded(file, path, room_of(path)))


def bounded(file: BinaryIO, path: Path, left: int) -> Iterator[bytes]:
    """Yield the blocks of a file unpacked from `path`, and close it. Raises UserError for more than `left` bytes."""
    with file:
        while block := file.read(BLOCK):
            left -= len(block)
            if left < 0:
                raise bomb(path)
            yield block


def room_of(path: Path) -> int:
    """The bytes that a compressed file or an archive may unpack to."""
    return max(FLOOR, RATIO * path.stat().st_size)


def bomb(path: Path) -> UserError:
    return UserError(
        f"{path} unpacks to more than {room_of(path):,} bytes, {RATIO} times its size, as files do that are made to "
        "fill a disk; unpack it yourself if you know what it holds, and give that"
    )


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The folder with the files of an archive, while it is open. Hidden files are left out. Raises UserError for links,
    and for names that lead out of the folder."""
    with tempfile.TemporaryDirectory() as name:
        folder, left = Path(name), room_of(path)
        with reading(path, "cannot be unpacked", "copy it again, or unpack it yourself, and give the folder"):
            for number, (member, file) in enumerate(members(path)):
                parts = PurePosixPath(member.replace("\\", "/")).parts
                if ".." in parts or PurePosixPath(member).is_absolute() or PureWindowsPath(member).anchor:
                    raise UserError(f"{path} holds {short(member)!r}, which leads out of it; leave that file out")
                if number >= MOST_FILES:
                    raise UserError(f"{path} holds more than {MOST_FILES:,} files; unpack it, and give the folder")
                if file is None or any(part.startswith((".", "__MACOSX")) for part in parts):
                    continue
                target = folder.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as copy:
                    for block in bounded(file, path, left):
                        left -= copy.write(block)
        yield folder


def members(path: Path) -> Iterator[tuple[str, BinaryIO | None]]:
    """Yield (name, file) of each member of an archive, None for a folder. Raises UserError for links and devices."""
    if kind_of(path) == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1:
                    raise UserError(f"{path} is locked by a password; unpack it, and give the folder")
                refuse_link(path, info.filename, stat.S_ISLNK(info.external_attr >> 16))
                yield info.filename, None if info.is_dir() else cast(BinaryIO, archive.open(info))
    else:
        with opened(path) as whole, tarfile.open(fileobj=whole, mode="r|") as tape:
            for member in tape:
                refuse_link(path, member.name, not member.isfile() and not member.isdir())
                yield member.name, cast(BinaryIO | None, tape.extractfile(member))


def refuse_link(path: Path, name: str, is_link: bool) -> None:
    if is_link:
        raise UserError(
            f"{path} holds {short(name)!r}, a link or a device, and only files of an archive are read; put the file "
            "in its place"
        )


def sheet(path: Path) -> list[list[Any]]:
    """The names of a workbook's sheets, and the rows of the first, as lists of cells."""
    command = python_command("rwkv_peft.data.workbook", path.resolve(), str(MEMORY))
    lines = converted(path, command if find_spec("python_calamine") else [], "python-calamine")
    return [json.loads(line) for line in lines.splitlines()]


def document(path: Path) -> str:
    """The text of an office document, a book or a page, by pandoc, which reads nothing beside it."""
    package = find_spec("pypandoc")  # which brings the program, in wheels of its own name
    beside = None
    if package is not None and package.origin:
        beside = shutil.which("pandoc", path=Path(package.origin).parent / "files")
    form = {".htm": "html"}.get(kind_of(path), kind_of(path)[1:])
    options = ["--sandbox", "--from", form, "--to", "plain", "--wrap", "none", "+RTS", f"-M{MEMORY}", "-RTS"]
    pandoc = beside or shutil.which("pandoc")
    return converted(path, [pandoc, *options, str(path.resolve())] if pandoc else [], "pandoc").decode()


def converted(path: Path, command: list[str], name: str) -> bytes:
    """The output of a command that reads a document, in a process of its own. An empty command stands for a program
    that is missing: UserError."""
    if not command:
        raise UserError(f"{path}: reading {kind_of(path)} needs {name}: {how_to_install('documents')}")
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: {name} reads it for more than {SECONDS} s; export its text as .txt") from None
    if done.returncode:
        why = (done.stderr.decode(errors="replace").strip().splitlines() or ["it ended"])[-1]
        raise UserError(f"{path} cannot be read by {name} ({in_line(short(why))}); copy it again, or export it as text")
    return done.stdout
