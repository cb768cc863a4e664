"""The weights of a model that decodes: in how many bits they are, and on a CPU where they lie in memory.

A step of decoding takes the time of reading them. Integers of 8 or 4 bits, to which `quantize_products` rounds the
matrices, take it down by what they save; on a CPU pages of 2 MiB halve it, because the processor reads ahead within a
page only.
"""

import mmap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.digest import digest_of
from ..checkpoints.tensors import read_safetensors, save_safetensors
from ..cli.errors import UserError
from ..models.parts import HeadFunction
from ..ops.decode import BITS, BLOCK, Blocks, product, quantize

CHUNK = 1 << 26  # bytes of memory that are asked for at once
LINE = 64  # bytes on whose boundary a tensor begins


class Product(nn.Module):
    """Takes the place of an nn.Linear without a bias, or of the head, where nothing trains: x Wᵀ."""

    weight: Any  # as the type checker sees what a module keeps

    def __init__(self, weight: torch.Tensor | Blocks) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor, function: HeadFunction | None = None) -> torch.Tensor:
        """x (..., in) -> (..., out), or function(x, weight)."""
        return product(x, self.weight) if function is None else function(x, self.weight)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Product":
        """Let blocks move with the model; no cast reaches them."""
        if isinstance(blocks := self.weight, Blocks):
            self.weight = blocks._replace(words=fn(blocks.words))
        return super()._apply(fn, recurse)


class Arena:
    """Memory in large pages, if the system lends them, for tensors that stay as long as the model does. Each tensor has
    a storage of its own, so that saving or pickling one writes no more than it."""

    def __init__(self) -> None:
        self.memory, self.used = mmap.mmap(-1, LINE), LINE

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor."""
        size = -(-tensor.nbytes // LINE) * LINE
        if self.used + size > len(self.memory):
            self.memory, self.used = large_pages(max(size, CHUNK)), 0
        mine = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.used)
        self.used += size
        return mine.view(tensor.shape).copy_(tensor)


def large_pages(size: int) -> mmap.mmap:
    """`size` bytes of memory of its own, in pages of 2 MiB if Linux lends them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a model, by name, whose place a Product can take: nn.Linear, without those of adapters."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if module.bias is None}


def rounded(model: nn.Module) -> dict[str, Product]:
    """The matrices of a model that are rounded to blocks, by the layer's name."""
    products = {name: module for name, module in model.named_modules() if isinstance(module, Product)}
    return {name: module for name, module in products.items() if isinstance(module.weight, Blocks)}


def quantize_products(
    model: nn.Module, kind: str, say: Callable[[str], object], kept_beside: str | Path | None = None
) -> None:
    """Round the matrices of a model's linear layers to blocks of kind "int8" or "int4", which take their place. say is
    told of the cast. With kept_beside, the model's file, blocks are read from a file beside it, or written there.
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
    kept = {} if kept_beside is None else kept_words(kept_beside, kind)
    for name, layer in layers.items():
        words = kept.get(name)
        blocks = quantize(layer.weight.detach(), bits) if words is None else Blocks(bits, layer.out_features, words)
        blocks = blocks._replace(words=arena.keep(blocks.words))
        before, after = before + layer.weight.nbytes, after + blocks.nbytes
        model.set_submodule(name, Product(blocks))
    if kept_beside is not None and not kept:
        made = {name: layer.weight.words.view(torch.uint8) for name, layer in rounded(model).items()}
        save_safetensors(file_of(kept_beside, kind), made, {"model": digest_of(kept_beside)})
    say(f"{kind} blocks of {BLOCK}: {before / 1e6:,.1f} -> {after / 1e6:,.1f} MB in {len(layers)} matrices")


def file_of(model: str | Path, kind: str) -> Path:
    """The file beside a model's that keeps its blocks of a kind."""
    return Path(model).with_suffix(f".{kind}.safetensors")


def kept_words(model: str | Path, kind: str) -> dict[str, torch.Tensor]:
    """{layer: words of its blocks} as they were kept beside the file of a model; {} if that held other bytes then."""
    file = file_of(model, kind)
    if not file.is_file():
        return {}
    found, metadata = read_safetensors(file, weights=False)
    same = metadata.get("model") == digest_of(model)
    return {name: words.view(torch.int32) for name, words in found.items()} if same else {}


def place(model: nn.Module) -> None:
    """Copy a CPU model's parameters into large pages, but leave embeddings, because a step reads one row of each."""
    arena = Arena()
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                parameter.data = arena.keep(parameter.data)


def decoding(model: nn.Module) -> None:
    """Let products with a CPU model's plain matrices take the kernels of decoding."""
    for name, layer in linears(model).items():
        model.set_submodule(name, Product(layer.weight))
