"""Writes small GGUF files that claim to hold gigabytes: rows, lists and tensors."""

import struct


def gguf(path, *settings, tensors=0, count=None):
    """A GGUF with settings (bytes after their names), which announces so many tensors."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, len(settings) if count is None else count)
    path.write_bytes(head + b"".join(settings))
    return path


def named(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def listed(kind, count):
    return struct.pack("<IQ", kind, count)


GGUFS = {  # a setting, and what is said of it
    "numbers": (named(b"a", 9, listed(0, 1 << 40)), "it ends within"),
    "many": (named(b"a", 9, listed(4, (1 << 64) - 1)), "it ends within"),
    "texts": (named(b"a", 9, listed(8, 1 << 40)), "it ends within"),
    "lists": (named(b"a", 9, listed(9, 1) * 50_000), "a list of lists"),
    "kind": (named(b"a", 77, b""), "the unknown type 77"),
    "value": (named(b"a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), "codec can't decode"),
    "name": (named(b"\xff\xfe", 4, b"\0\0\0\0"), "codec can't decode"),
    "length": (named(b"a", 8, struct.pack("<Q", 1 << 62)), "it ends within"),
}
