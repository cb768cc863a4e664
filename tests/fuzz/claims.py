"""Writes small files that claim to hold gigabytes: objects, rows, lists and tensors."""

import pickle
import re
import struct
import zipfile


def item(value):
    """The instructions of a pickle that make a value."""
    return pickle.dumps(value, 2)[2:-1]


def call(name, argument):
    """A pickle that calls a function."""
    return b"\x80\x02c" + name.replace(".", "\n").encode() + b"\n" + item(argument) + b"\x85R."


def zipped(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


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


def one_layer_for_all(state):
    """The state of a model whose layers after the first share one storage, which a file of it holds once."""
    shared = {key: "blocks.1." + key.split(".", 2)[2] for key in state if re.match(r"blocks\.[1-9]", key)}
    return state | {key: state[other] for key, other in shared.items()}
