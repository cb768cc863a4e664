"""Read the header of a GGUF file: its settings, and its tensors' sizes and types.

The gguf package's reader makes an object for everything that a header announces, and follows lists to any depth. This
one trusts no announced size beyond the bytes that are there, so that a damaged header cannot exhaust memory
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ..errors import UserError, told
from ..files.readable import require_readable

Value = bool | int | float | str | list[bool | int | float | str]
# GGUF's number of a type -> its struct format
NUMBERS = MappingProxyType({0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"})
TEXT, LIST = 8, 9
MOST_DIMENSIONS = 4  # ggml's limit
KEPT = 64  # the first values of a list that are kept; `lengths` has the count of all


class GgufTensor(NamedTuple):
    name: str
    size: int  # in numbers
    kind: int  # ggml's number of the type


class GgufHeader(NamedTuple):
    """The header: settings by name (lists cut to their first values), the lists' full lengths by name, the tensors."""

    settings: dict[str, Value]
    lengths: dict[str, int]
    tensors: list[GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Read the GgufHeader of a file. Raises UserError if the file is missing or its header is damaged."""
    require_readable(path, f"{path} does not exist; check the name", again=True)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return Reader(mapped).header()
    except ValueError as error:
        raise UserError(f"{path} is no readable GGUF: {told(error)}; copy it again") from error


class Reader:
    """A reader of a header, from its beginning on. Raises ValueError for bytes that are no header, and for a header
    that runs past the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def header(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are known")
        tensors, settings = self.number("Q"), self.number("Q")
        found: GgufHeader = GgufHeader({}, {}, [])
        for _ in range(settings):
            self.setting(found)
        for _ in range(tensors):
            name, dimensions = self.text(), self.number("I")
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions:,} dimensions")
            shape = [self.number("Q") for _ in range(dimensions)]
            kind, _place = self.number("I"), self.number("Q")
            found.tensors.append(GgufTensor(name, math.prod(shape), kind))
        return found

    def setting(self, found: GgufHeader) -> None:
        name, kind = self.text(), self.number("I")
        if kind != LIST:
            found.settings[name] = self.reader(kind)()
            return
        read, count = self.reader(inner := self.number("I")), self.number("Q")
        found.lengths[name] = count
        found.settings[name] = [read() for _ in range(min(count, KEPT))]
        if inner in NUMBERS:
            self.take((count - min(count, KEPT)) * struct.calcsize("<" + NUMBERS[inner]))
        else:
            for _ in range(KEPT, count):  # texts: each has its own length
                read()

    def reader(self, kind: int) -> Callable[[], bool | int | float | str]:
        """The method that reads a value of a type, other than a list. Raises ValueError for a list or unknown type."""
        if kind == TEXT:
            return self.text
        if kind in NUMBERS:
            return lambda: self.number(NUMBERS[kind])
        raise ValueError(f"it has a list of lists, or a value of the unknown type {kind}")

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.place:
            raise ValueError(f"it ends within {length:,} bytes that it announces")
        self.place += length
        return self.data[self.place - length : self.place] if length <= 1 << 20 else b""

    def number(self, form: str) -> int:
        (value,) = struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))
        return value

    def text(self) -> str:
        """Read a text; one of more than a megabyte is skipped and reads as ""."""
        return self.take(self.number("Q")).decode("utf-8")
