"""The weights of a model that decodes: their bits, and on a CPU their place in memory.

A decoding step takes the time of reading them. `quantize_products` rounds matrices to integers of 8 or 4 bits, which
saves that share of it; on a CPU pages of 2 MiB halve it, because the processor reads ahead within a page only.
"""

import mmap
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..cli.errors import UserError
from ..models.parts import HeadFunction
from ..ops.decode import BITS, BLOCK, Blocks, product, quantize

CHUNK = 1 << 26  # bytes of memory that are mapped at once
LINE = 64  # bytes on whose boundary a tensor begins


class FrozenLinear(nn.Module):
    """x Wᵀ in place of an nn.Linear without a bias, or of the head, in a frozen model."""

    weight: Any  # nn.Module's own annotation hides Blocks from the type checker

    def __init__(self, weight: torch.Tensor | Blocks) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor, function: HeadFunction | None = None) -> torch.Tensor:
        """x (..., in) -> (..., out), or function(x, weight)."""
        return product(x, self.weight) if function is None else function(x, self.weight)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "FrozenLinear":
        """Let blocks move with the model; no cast reaches them."""
        if isinstance(blocks := self.weight, Blocks):
            self.weight = blocks._replace(words=fn(blocks.words))
        return super()._apply(fn, recurse)


class Arena:
    """Memory in large pages, if the system has them, for tensors that stay as long as the model. Each tensor gets a
    storage of its own, so that pickling one writes no other."""

    def __init__(self) -> None:
        self.memory, self.used = mmap.mmap(-1, LINE), LINE

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor."""
        size = -(-tensor.nbytes // LINE) * LINE
        if self.used + size > len(self.memory):
            self.memory, self.used = large_pages(max(size, CHUNK)), 0
        mine = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.used)
        self.used += size
        return mine.view(tensor.shape).copy_(tensor)


def large_pages(size: int) -> mmap.mmap:
    """`size` bytes of anonymous memory, in pages of 2 MiB if Linux has them."""
    if sys.platform != "linux":
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a model, by name, that a FrozenLinear can replace: nn.Linear, without those of adapters."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if module.bias is None}


def rounded(model: nn.Module) -> dict[str, FrozenLinear]:
    """The matrices of a model that are rounded to blocks, by the layer's name."""
    products = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    return {name: module for name, module in products.items() if isinstance(module.weight, Blocks)}


def quantize_products(model: nn.Module, kind: str, log: Callable[[str], object]) -> None:
    """Round the matrices of a model's linear layers to blocks of kind "int8" or "int4", in place, and log their sizes.
    Raises UserError for a width that is not a whole number of blocks."""
    layers, bits = linears(model), int(kind.removeprefix("int"))
    assert bits in BITS  # the flags' choices
    for name, layer in layers.items():
        if layer.in_features % BLOCK:
            raise UserError(
                f"--weights {kind}: {name} has rows of {layer.in_features} weights, and blocks have {BLOCK}; leave the "
                "flag out for this model"
            )
    arena, before, after = Arena(), 0, 0
    for name, layer in layers.items():
        blocks = quantize(layer.weight.detach(), bits)
        blocks = blocks._replace(words=arena.copy(blocks.words))
        before, after = before + layer.weight.nbytes, after + blocks.nbytes
        model.set_submodule(name, FrozenLinear(blocks))
    log(f"{kind} blocks of {BLOCK}: {before / 1e6:,.1f} -> {after / 1e6:,.1f} MB in {len(layers)} matrices")


def place(model: nn.Module) -> None:
    """Copy a CPU model's parameters into large pages, but leave embeddings, because a step reads one row of each."""
    arena = Arena()
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = arena.copy(parameter.data)
