"""Calls cpu/mix, which is built on first use, through its structures."""

import ctypes
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from ..native.calls import fields, fill
from ..native.cpu import CpuFamily
from .operations import OPERATIONS, Operation, class_name


class LerpArguments(ctypes.Structure):
    """The structure of the same name in cpu/mix/arguments.h, as OPERATIONS' are."""

    _fields_ = fields(
        "x last maa low up outs grads gx glast gmaa glow gup cu_seqlens", "n tokens channels rank sequences"
    )


def _structure(name: str, op: Operation) -> type[ctypes.Structure]:
    names = [*op.inputs, *op.parameters, *op.outputs, *(name for names in op.gradients for name in names)]
    members = fields(" ".join(names), "tokens channels" + " size" * op.by_head, "eps" * op.has_eps)
    return type(f"{class_name(name)}Arguments", (ctypes.Structure,), {"_fields_": members})


STRUCTURES: Mapping[str, type[ctypes.Structure]] = MappingProxyType(
    {"lerp": LerpArguments, **{name: _structure(name, op) for name, op in OPERATIONS.items()}}
)
FUNCTIONS = tuple(
    (f"mix_{name}_{direction}", None, structure)
    for name, structure in STRUCTURES.items()
    for direction in ("forward", "backward")
)
FAMILY = CpuFamily("mix", FUNCTIONS, in_graphs=True)


def call(name: str, like: Tensor, tensors: Mapping[str, Tensor | None], **sizes: float) -> None:
    """Run an operation, such as "relu_square_forward", given tensors by name (None: not given) and the rest of its
    structure; a lerp's points out0, out1, …, and their gradients grad0, … go by a table of addresses. Does nothing for
    tensors without data."""
    if like.is_meta:
        return
    structure, tables = STRUCTURES[name.rpartition("_")[0]], {}
    if structure is LerpArguments:
        for kind in ("out", "grad"):
            points = [x.data_ptr() for i in range(int(sizes["n"])) if (x := tensors.get(f"{kind}{i}")) is not None]
            tables[f"{kind}s"] = (ctypes.c_void_p * len(points))(*points)
        names = {name for name, _ in structure._fields_}
        tensors = {name: x for name, x in tensors.items() if name in names}
    addresses = {name: ctypes.addressof(table) for name, table in tables.items()}
    getattr(FAMILY.library(), f"mix_{name}")(fill(structure, like, tensors, **addresses, **sizes))
