"""Mutations that break a file's bytes as a bad disk, a bad copy or a bad program does: any file's, JSON, YAML,
.safetensors, and what torch.save writes.

Each mutation takes a file's content and a random.Random, and returns another content.
"""

import io
import json
import math
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable

import torch

Mutation = Callable[[bytes, random.Random], bytes]

ODD_JSON = (
    *"null true -1 0 1.5 1e400 NaN -Infinity".split(),
    *("9" * 5000, str(1 << 62), str((1 << 64) + 1), '""', '"\\ud800"', '"\\u0000"', "[]", "{}", "[[1]]", '{"a": {}}'),
    "[",
)


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def cut_short(content: bytes, rng: random.Random) -> bytes:
    """Cut a little off the end."""
    return content[: -rng.randint(1, 64)]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Change some bytes anywhere."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flipped_head(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 4))):
        changed[rng.randrange(min(64, len(changed)))] = rng.randrange(256)
    return bytes(changed)


def extreme_number(content: bytes, rng: random.Random) -> bytes:
    """Overwrite some bytes with a number that no size should be."""
    number = rng.choice((b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x00" * 8, b"\xff" * 4, b"\x00" * 4, b"\x80\xff"))
    start = rng.randrange(max(1, min(len(content), rng.choice((32, 512, 1 << 30))) - len(number)))
    return content[:start] + number + content[start + len(number) :]


def without_a_part(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randint(1, 300) :]


def with_a_part_twice(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    stop = start + rng.randint(1, 300)
    return content[:stop] + content[start:]


def zeroed(content: bytes, rng: random.Random) -> bytes:
    """Zero a block, as if the disk had never written it."""
    start = rng.randrange(len(content))
    size = min(rng.choice((16, 512, 4096)), len(content) - start)
    return content[:start] + bytes(size) + content[start + size :]


def longer(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randint(1, 100))


def noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(0, 400))


BYTES: tuple[Mutation, ...] = (
    *(truncated, cut_short, flipped, flipped_head, extreme_number),
    *(without_a_part, with_a_part_twice, zeroed, longer, noise),
)


def other_value(content: bytes, rng: random.Random) -> bytes:
    """Replace one value anywhere in JSON."""
    marks: list[str] = []

    def places(value: object) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + sum(places(item) for item in inner)

    def changed(value: object, number: int) -> object:
        """value with the number-th place in it, counted in depth, marked."""
        if number == 0:
            marks.append(json.dumps(f"mark {rng.random()}"))
            return json.loads(marks[0])
        number -= 1
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):  # type: ignore[arg-type]
            if number < (size := places(item)):
                copy = dict(value) if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
                copy[key] = changed(item, number)
                return copy
            number -= size
        raise AssertionError("no such place")

    value = json.loads(content)
    return json.dumps(changed(value, rng.randrange(places(value)))).replace(marks[0], rng.choice(ODD_JSON)).encode()


def other_key(content: bytes, rng: random.Random) -> bytes:
    """Remove or rename one key of a JSON object."""
    value = json.loads(content)
    if not isinstance(value, dict) or not value:
        return b"{}"
    key = rng.choice(list(value))
    item = value.pop(key)
    if rng.random() < 0.5:
        value[rng.choice(("", "x", "\ud800", key.upper(), key * 50))] = item
    return json.dumps(value).encode()


JSON: tuple[Mutation, ...] = (other_value, other_key)


def named(change: Mutation, mutation: Mutation) -> Mutation:
    """`change` under the name of the mutation that it applies to one part of a file."""
    change.__qualname__ = change.__qualname__.split(".")[0] + " " + mutation.__qualname__
    return change


def in_one_line(mutation: Mutation) -> Mutation:
    """Apply a mutation to one line of a file."""

    def change(content: bytes, rng: random.Random) -> bytes:
        lines = content.split(b"\n")
        number = rng.choice([number for number, line in enumerate(lines) if line])
        lines[number] = mutation(lines[number], rng)
        return b"\n".join(lines)

    return named(change, mutation)


def in_safetensors_header(mutation: Mutation) -> Mutation:
    """Apply a mutation to the JSON header of a .safetensors, and correct its length."""

    def change(content: bytes, rng: random.Random) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = mutation(content[8 : 8 + length], rng)
        return struct.pack("<Q", len(header)) + header + content[8 + length :]

    return named(change, mutation)


def in_metadata(key: str, mutation: Mutation) -> Mutation:
    """Apply a mutation to the JSON text in an entry of a .safetensors file's metadata."""

    def of_header(header: bytes, rng: random.Random) -> bytes:
        values = json.loads(header)
        text = mutation(values["__metadata__"][key].encode(), rng)
        values["__metadata__"][key] = text.decode(errors="replace")
        return json.dumps(values).encode()

    return in_safetensors_header(named(of_header, mutation))


def odd_yaml(content: bytes, rng: random.Random) -> bytes:
    """Give one key of a settings file a value that YAML reads, or almost, and JSON has not."""
    odd = "2001-01-01 9999-99-99 !!binary|x !!set|{a} !!python/object:os.system|x .inf ~ <<:|a ?|[a]".split()
    value = rng.choice((*odd, "0x" + "f" * 5000, "9" * 5000, "1:" * 50 + "1", '"\\ud800"')).replace("|", " ")
    lines = content.split(b"\n")
    number = rng.randrange(len(lines))
    key = lines[number].partition(b":")[0]
    lines[number] = key + b": " + rng.choice(("{}", "{{lora_r: {}}}", "[{}]")).format(value).encode()
    return b"\n".join(lines)


def other_dtype(content: bytes, rng: random.Random) -> bytes:
    """Change a tensor's dtype in a .safetensors to another of the same width."""
    names = {b'"F32"': (b'"U32"', b'"I32"'), b'"F16"': (b'"U16"', b'"I16"', b'"BF16"')}
    old = next(name for name in names if name in content)
    start = rng.choice([place for place in range(len(content)) if content.startswith(old, place)])
    return content[:start] + rng.choice(names[old]) + content[start + len(old) :]


def odd_literal(content: bytes, rng: random.Random) -> bytes:
    """A line of a vocabulary whose token is an expression or an odd text, and whose number or length may be absurd."""
    odd = ("-1", "0xff", "(", "[[]]", "'a'-'b'", "'a'*99", "b'a", "'\\ud800'", "'\\x00'", "'a' 'b'", "{}", "None")
    literal = rng.choice((*odd, "9" * 5000, "'" + "a" * 10_000 + "'"))
    return f"{rng.choice((1, 5, -1, 1 << 40))} {literal} {rng.choice((1, 10, 9999999999999))}".encode()


# --- what torch.save writes


def in_pickle(mutation: Mutation) -> Mutation:
    """Apply a mutation to the pickle in a .pth, and correct the archive's checksums."""

    def change(content: bytes, rng: random.Random) -> bytes:
        target = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(target, "w") as copy:
            for name in archive.namelist():
                record = archive.read(name)
                copy.writestr(name, mutation(record, rng) if name.endswith("data.pkl") else record)
        return target.getvalue()

    return named(change, mutation)


def without_a_record(content: bytes, rng: random.Random) -> bytes:
    """Remove one record of a .pth, or put another in its place."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(target, "w") as copy:
        names = archive.namelist()
        gone = rng.choice(names)
        for name in names:
            if name != gone:
                copy.writestr(name, archive.read(name))
            elif rng.random() < 0.5:
                copy.writestr(name, archive.read(rng.choice(names)))
    return target.getvalue()


def other_opcode(content: bytes, rng: random.Random) -> bytes:
    """Remove, double or replace one instruction of a pickle."""
    starts = [position for _, _, position in pickletools.genops(content)]
    number = rng.randrange(len(starts))
    start, stop = starts[number], (starts + [len(content)])[number + 1]
    taken = content[start:stop]
    new = rng.choice(
        (b"", taken * 2, b"N", b"}", b"]", b")", b"K\x00", b"J\xff\xff\xff\xff", b"0", b"Q", b"R", b"h\xff")
    )
    return content[:start] + new + content[stop:]


def other_number(content: bytes, rng: random.Random) -> bytes:
    """Replace one number of a pickle (a size, a stride, an offset)."""
    numbers = [
        (op, arg, pos) for op, arg, pos in pickletools.genops(content) if op.name in ("BININT", "BININT1", "BININT2")
    ]
    op, _, start = rng.choice(numbers)
    width = {"BININT": 5, "BININT1": 2, "BININT2": 3}[op.name]
    new = rng.choice((0, 1, -1, -(1 << 31), (1 << 31) - 1, 1 << 40, (1 << 62) + 1, 1 << 70))
    return content[:start] + pickle.dumps(new, protocol=2)[2:-1] + content[start + width :]


def other_storage(content: bytes, rng: random.Random) -> bytes:
    """Replace one name in a pickle (of a storage's type, a function, a device)."""
    for old, new in (
        (b"FloatStorage", rng.choice((b"IntStorage", b"HalfStorage", b"UntypedStorage", b"ComplexFloatStorage"))),
        (b"BFloat16Storage", rng.choice((b"ShortStorage", b"HalfStorage", b"UntypedStorage", b"BoolStorage"))),
        (b"_rebuild_tensor_v2", rng.choice((b"_rebuild_parameter", b"_rebuild_sparse_tensor", b"_rebuild_tensor"))),
        (b"OrderedDict", rng.choice((b"Counter", b"deque", b"dict"))),
    ):
        if old in content and rng.random() < 0.6:
            return content.replace(b"\n" + old, b"\n" + new)
    return content.replace(b"\x03\x00\x00\x00cpu", b"\x03\x00\x00\x00" + rng.choice((b"xpu", b"gpu", b"hip")))


def other_tensor(content: bytes, rng: random.Random) -> bytes:
    """Give one tensor of a .pth another shape, dtype, layout or name."""
    tensors = torch.load(io.BytesIO(content), weights_only=True)
    key = rng.choice(list(tensors))
    tensor, other = tensors[key], rng.choice(list(tensors))
    choices = (
        lambda t: t.to(rng.choice((torch.uint16, torch.uint32, torch.uint64, torch.int64, torch.bool, torch.float64))),
        lambda t: t.to(rng.choice((torch.complex64, torch.float8_e4m3fn, torch.float16))),
        lambda t: torch._neg_view(t),
        lambda t: t.to(torch.complex64).conj(),
        lambda t: t.to(torch.complex64).conj().imag,
        lambda t: t[..., :1].expand(*t.shape[:-1], rng.choice((2, 1 << 40))),
        lambda t: t.reshape(-1)[:1].expand(1 << 20, 1 << 20),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: torch.nested.nested_tensor([t, t]),
        lambda t: torch.nn.Parameter(t),
        lambda t: t.mT if t.dim() > 1 else t[None],
        lambda t: t.reshape(-1),
        lambda t: t.sum(),
        lambda t: t[..., :0],
        lambda t: t[:0],
        lambda t: t[..., :1].contiguous(),
        lambda t: t[:1].clone(),
        lambda t: t.new_zeros(0, 1 << 40),
        lambda t: t * math.nan,
        lambda t: tensors[other],
        lambda t: t.tolist(),
    )
    if rng.random() < 0.2:
        new = rng.choice(
            ("", "\ud800", other + ".x", key.replace("0", "99999999999"), key.replace("0", "7"), "x" * 999)
        )
        del tensors[key]
        tensors[rng.choice((new, 3, None, (1, (2,)), b"x"))] = tensor
    else:
        tensors[key] = rng.choice(choices)(tensor)
    target = io.BytesIO()
    torch.save(tensors, target)
    return target.getvalue()


PICKLE: tuple[Mutation, ...] = (*(other_opcode, other_number, other_number), *(other_storage, flipped, truncated))
