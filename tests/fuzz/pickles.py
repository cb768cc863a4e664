"""Mutations of what torch.save writes: records, instructions of the pickle, tensors and entries."""

import io
import math
import pickle
import pickletools
import random
import zipfile

import torch

from fuzz.mutations import DEEP, Mutation, flipped, named, truncated


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


def deep_pickle(content: bytes, rng: random.Random) -> bytes:
    """A pickle of lists in lists, far deeper than anything that recurses can follow."""
    return b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."


def call_for_memory(content: bytes, rng: random.Random) -> bytes:
    """A pickle that allocates, and drops, an object of a size that it names."""
    name = rng.choice((b"builtins\nbytearray", b"torch\nFloatTensor", b"torch\nFloatStorage", b"torch\nTensor"))
    size = pickle.dumps(rng.choice((1 << 33, 1 << 40, 1 << 62)), protocol=2)[2:-1]
    return content[:2] + b"c" + name + b"\n" + size + b"\x85R0" + content[2:]


PICKLE: tuple[Mutation, ...] = (
    *(other_opcode, call_for_memory, other_number, other_number),
    *(other_storage, flipped, truncated, deep_pickle),
)
