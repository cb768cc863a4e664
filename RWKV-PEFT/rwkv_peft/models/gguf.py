"""The part of llama.cpp's form that all generations share: describing a tensor, and the tensors around time-mix."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..config import ModelConfig
from .family import GgufTensor

CONTEXT = 1 << 20  # a recurrent model has no limit; llama.cpp's own converter writes this


def all_settings(config: ModelConfig, *own: tuple[str, float]) -> tuple[tuple[str, float], ...]:
    """Family.gguf_settings: those that all generations have, around a generation's own."""
    return (
        ("add_context_length", CONTEXT),
        ("add_embedding_length", config.n_embd),
        ("add_block_count", config.n_layer),
        ("add_layer_norm_eps", 1e-5),
        *own,
        ("add_feed_forward_length", config.dim_ffn),
        ("add_head_count", 0),  # there are no attention heads
    )


def flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def gguf_module(module: str) -> str:
    """llama.cpp's name of a layer that takes adapters: blocks.0.att.key -> blk.0.time_mix_key, ffn -> channel_mix."""
    _, block, part, name = module.split(".")
    return f"blk.{block}.{'time' if part == 'att' else 'channel'}_mix_{name}"


class GgufTensors:
    """Describes tensors of a state dict as Family.gguf_tensors yields them; each is made when it is read."""

    def __init__(self, base: Mapping[str, Tensor]) -> None:
        self.base = base

    def entry(
        self, name: str, key: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor, large: bool = False
    ) -> GgufTensor:
        base = self.base
        return name, tuple(change(base[key].to("meta")).shape), lambda: change(base[key]), large

    def stacked(self, name: str, keys: Sequence[str]) -> GgufTensor:
        """Tensors of one shape, stacked along a new first axis."""
        base = self.base
        return name, (len(keys), *base[keys[0]].shape), lambda: torch.stack([base[key] for key in keys]), False

    def affine(self, name: str, key: str) -> Iterator[GgufTensor]:
        """The weight and bias of a norm."""
        for part in ("weight", "bias"):
            yield self.entry(f"{name}.{part}", f"{key}.{part}")

    def embedding(self) -> Iterator[GgufTensor]:
        """The tensors before the blocks."""
        yield self.entry("token_embd.weight", "emb.weight", large=True)
        yield from self.affine("token_embd_norm", "blocks.0.ln0")

    def norms(self, i: int) -> Iterator[GgufTensor]:
        """The norms of block i."""
        yield from self.affine(f"blk.{i}.attn_norm", f"blocks.{i}.ln1")
        yield from self.affine(f"blk.{i}.attn_norm_2", f"blocks.{i}.ln2")
        yield from self.affine(f"blk.{i}.time_mix_ln", f"blocks.{i}.att.ln_x")

    def head(self) -> Iterator[GgufTensor]:
        """The tensors after the blocks."""
        yield from self.affine("output_norm", "ln_out")
        yield self.entry("output.weight", "head.weight", large=True)
