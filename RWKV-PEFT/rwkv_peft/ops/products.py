"""Dense products of models, adapters and heads: the one place through which they go, and the table of what each
processor multiplies fast.

Many CPUs have no instructions for bfloat16 or float16, and torch multiplies these there by plain loops, up to a hundred
times as slowly as float32. Weights and activations stay in their dtype in memory there, and are converted to float32
for the time of one product, with one rounding of its result. float32 itself goes to torch's library (on x86 MKL, which
takes instructions of half the width on AMD), or to oneDNN. On all other devices each function is torch's.
"""

import functools
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .native.calls import constant_when_compiled

HALVES = (torch.bfloat16, torch.float16)
ELEMENTS = 1 << 22  # of a matrix that are converted at a time: 16 MiB
SMALL = 1 << 21  # multiplications of a float32 product below which calling oneDNN takes longer than it saves


@dataclass(frozen=True)
class ProductRow:
    """How a processor computes products on the CPU. bf16: True if bfloat16 is multiplied as it is, else converted to
    float32, as float16 always is; onednn: True if oneDNN multiplies float32, else torch's library; known: the source of
    that."""

    bf16: bool
    onednn: bool
    known: str = ""

    def __str__(self) -> str:
        halves = "bfloat16 as it is, float16 in float32" if self.bf16 else "bfloat16 and float16 in float32"
        return f"{halves}, float32 by {'oneDNN' if self.onednn else 'torch'}"

    def recorded(self) -> dict[str, str]:
        """The row in JSON's types, which computes the same wherever it is equal."""
        return {"bf16": "native" if self.bf16 else "fp32", "fp32": "onednn" if self.onednn else "torch"}

    @classmethod
    def of(cls, recorded: Mapping[str, str]) -> "ProductRow":
        """The Row of `recorded`'s result."""
        return cls(recorded["bf16"] == "native", recorded["fp32"] == "onednn", "the run's record")


CONVERTING = ProductRow(False, False, "without instructions for bfloat16 that are faster than float32's")
NATIVE = ProductRow(True, False, "matrix units (AMX), or Arm's instructions for bfloat16; benchmarks/step.py")
ZEN = ProductRow(True, True, "AMD's Zen 4 and 5, measured by benchmarks/step.py")
# (vendor, family) of processors with AVX512-BF16 and without AMX. Others of that kind convert: on Intel's, and on a
# Xeon with AMX that is told to do without, bfloat16 takes 1.8 times the time of float32, as much as converting does.
ROWS = MappingProxyType({("AuthenticAMD", 25): ZEN, ("AuthenticAMD", 26): ZEN})
# Of the rows above if oneDNN may use AVX-512, but not its instructions for bfloat16.
WITHOUT_BFLOAT16 = MappingProxyType({family: ProductRow(False, row.onednn, row.known) for family, row in ROWS.items()})


def agreed(rows: Sequence[ProductRow], recorded: Mapping[str, str] | None) -> tuple[ProductRow, list[str]]:
    """(the Row by which all ranks of a run compute, notes on it), by each rank's own and that of a checkpoint's record.

    A run goes on by the recorded row, unless a rank would multiply bfloat16 by plain loops then.
    """
    row, notes = rows[0], list[str]()
    if unlike := [n for n, other in enumerate(rows) if other.recorded() != row.recorded()]:
        notes.append(
            f"rank 0 multiplies {row}, rank {unlike[0]} {rows[unlike[0]]}: all take {CONVERTING}, which is alike"
        )
        row = CONVERTING
    if recorded and recorded != row.recorded():
        before = ProductRow.of(recorded)
        if not unlike and all(own.bf16 or not before.bf16 for own in rows):
            row = before
        notes.append(
            f"the run multiplied {before} before, on another processor; it goes on with {row}, and bits may differ"
        )
    return row, notes


_CHOSEN: ContextVar[ProductRow | None] = ContextVar("row of products", default=None)


@contextmanager
def computing(row: ProductRow) -> Iterator[None]:
    """Within, products on the CPU are computed as a Row says, whatever the processor."""
    before = _CHOSEN.set(row)
    try:
        yield
    finally:
        _CHOSEN.reset(before)


@constant_when_compiled  # torch.compile cannot trace what asks the system
def row() -> ProductRow:
    """The Row that this thread's products are computed by: this processor's, unless `computing` names another."""
    return _CHOSEN.get() or row_of_processor()


@functools.cache
def row_of_processor() -> ProductRow:
    """The Row of this processor, and of the instructions that oneDNN and torch may use of it."""
    vendor, family = vendor_and_family()
    return row_of(
        vendor,
        family,
        machine=platform.machine().lower(),
        limit=os.environ.get("ONEDNN_MAX_CPU_ISA", ""),  # oneDNN's own; it multiplies for torch
        has_avx512="AVX512" in torch.backends.cpu.get_cpu_capability(),  # as ATEN_CPU_CAPABILITY limits it
        has_bf16=getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)(),
        has_amx=torch.cpu._init_amx(),
        arm_bf16=bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False,
    )


def row_of(
    vendor: str,
    family: int,
    *,
    machine: str,
    limit: str,
    has_avx512: bool,
    has_bf16: bool,
    has_amx: bool,
    arm_bf16: bool,
) -> ProductRow:
    """The Row of a processor by its instructions, because a measurement can differ from one run to the next, and a run
    resumes bitwise.

    limit: ONEDNN_MAX_CPU_ISA's value; has_avx512: if torch may use it; the others: if the processor has them.
    """
    if machine in ("aarch64", "arm64"):
        return NATIVE if arm_bf16 else CONVERTING
    limit = limit.upper()
    unlimited = limit in ("", "ALL", "DEFAULT")
    if has_amx and (unlimited or "AMX" in limit):
        return NATIVE
    wide = has_avx512 and (unlimited or limit.startswith(("AVX512_CORE", "AVX10")))
    if not wide or not has_bf16 or has_amx:
        return CONVERTING
    rows = ROWS if unlimited or limit not in ("AVX512_CORE", "AVX512_CORE_VNNI") else WITHOUT_BFLOAT16
    return rows.get((vendor, family), CONVERTING)


def vendor_and_family() -> tuple[str, int]:
    """This processor's vendor and family as the cpuid instruction has them; ("", 0) if the system does not say."""
    said = platform.processor()  # on Windows: AMD64 Family 26 Model 2 Stepping 0, AuthenticAMD
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        said = cpus.read_text(errors="replace").split("\n\n")[0]
    vendor = re.search(r"AuthenticAMD|GenuineIntel", said)
    family = re.search(r"(?:cpu family\s*:|Family)\s*(\d+)", said)
    return (vendor[0], int(family[1])) if vendor and family else ("", 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""
    if not (converts(x) or _suits_onednn(x, weight.t())):
        return F.linear(x, weight, bias)
    y = _product(x.reshape(-1, x.shape[-1]), weight.t(), bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b: a (..., n) and a matrix b (n, m) -> (..., m), or batches of as many matrices."""
    if not (converts(a) or _suits_onednn(a, b)):
        return a @ b
    return linear(a, b.t()) if b.dim() == 2 else _product(a, b)


def addmm_(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """total = beta total + alpha a b, of matrices or of batches of them, without gradients. total is not read if beta
    is 0."""
    if converts(a) or _suits_onednn(a, b):
        return _converted_(total, a, b, beta, alpha)
    return (total.addmm_ if total.dim() == 2 else total.baddbmm_)(a, b, beta=beta, alpha=alpha)


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale a b, of matrices, in one operation, without gradients."""
    if converts(a) or _suits_onednn(a, b):
        return _converted_(a.new_empty(len(a), b.shape[1]), a, b, 0.0, scale)
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """torch.einsum, without gradients."""
    if not converts(a):
        return torch.einsum(equation, a, b)
    return torch.einsum(equation, a.float(), b.float()).to(a.dtype)


def converts(x: Tensor) -> bool:
    """True if products of x, and of others of its dtype, are computed in float32."""
    return x.is_cpu and is_slow(x.dtype)


def is_slow(dtype: torch.dtype) -> bool:
    """True if the Row converts a dtype to float32 for products."""
    return dtype in HALVES and not (dtype == torch.bfloat16 and row().bf16)


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    """True if oneDNN multiplies a (..., n) and a matrix b (n, m) of float32. Its operator knows no autocast."""
    if not (a.is_cpu and a.dtype == torch.float32 and b.dim() == 2 and row().onednn):
        return False
    return a.numel() * b.shape[1] >= SMALL and not torch.is_autocast_enabled("cpu")


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias in float32: a (..., m, n), b (..., n, k), bias (k,) or None."""
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (a, b, bias))
    product: Tensor = _Product.apply(a, b, bias) if trained else _forward(a, b, bias)
    return product


class _Product(Function):
    """_product with gradients, which keeps no converted tensor."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)
        return _forward(a, b, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        need_a, need_b, need_bias = ctx.needs_input_grad
        ga = matmul(g, b.mT) if need_a else None
        gb = matmul(a.mT, g) if need_b else None
        return ga, gb, g.sum(0) if need_bias else None


def _forward(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if a.dtype == torch.float32 or _parts(a, b) == 1:
        wide = _wide_product(a.float(), b.float())
        return (wide if bias is None else wide.add_(bias)).to(a.dtype)
    y = a.new_empty(a.shape[0], b.shape[1])
    if bias is None:
        return _converted_(y, a, b, 0.0, 1.0)
    return _converted_(y.copy_(bias), a, b, 1.0, 1.0)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b of float32, by the operator of oneDNN and not by torch's switch for it, which lets it round to bfloat16."""
    if _suits_onednn(a, b):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
        return y
    return a @ b


def _converted_(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """addmm_ in float32. Large matrices are cut along their longest side, and converted a part at a time."""
    parts, (rows, inner), columns = _parts(a, b), a.shape[-2:], b.shape[-1]
    if parts > 1 and inner < max(rows, columns):
        if columns > rows:
            wide, pieces = a.float(), zip(total.chunk(parts, 1), b.chunk(parts, 1))
            each = ((some, wide, chunk) for some, chunk in pieces)
        else:
            wide, pieces = b.float(), zip(total.chunk(parts), a.chunk(parts))
            each = ((some, chunk, wide) for some, chunk in pieces)
        for some, left, right in each:
            _converted_(some, left, right, beta, alpha)
        return total
    wide = total.float() if beta or total.dtype == torch.float32 else torch.empty_like(total, dtype=torch.float32)
    for left, right in zip(a.chunk(parts, -1), b.chunk(parts, -2)):
        _add_product_(wide, left.float(), right.float(), beta, alpha)
        beta = 1.0
    return total.copy_(wide)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> None:
    """addmm_ of float32."""
    if not _suits_onednn(a, b):
        (total.addmm_ if total.dim() == 2 else total.baddbmm_)(a, b, beta=beta, alpha=alpha)
    elif beta == 0:
        torch.mul(_wide_product(a, b), alpha, out=total)
    else:
        (total if beta == 1 else total.mul_(beta)).add_(_wide_product(a, b), alpha=alpha)


def _parts(a: Tensor, b: Tensor) -> int:
    """The number of parts in which a product is computed, so that none has more than ELEMENTS; batches are small."""
    if a.dim() > 2:
        return 1
    (rows, inner), columns = a.shape, b.shape[1]
    return max(1, -(-max(rows * inner, inner * columns, rows * columns) // ELEMENTS))
