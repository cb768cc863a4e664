"""Gives the blocks of a model their fused forward, or leaves them plain: decides once, after the adapters are in and
before the engine starts, and says so in one line."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import RunConfig
from ..models.parts import LanguageModel
from ..ops.bone import cuda as bone
from ..ops.mix import cuda as mix
from ..ops.native.family import CudaFamily
from ..ops.wkv7 import cuda as wkv7
from . import rwkv6, rwkv7
from .feed_forward import chained, chains, layer_by_layer


@dataclass(frozen=True)
class Setting:
    """A run's settings that decide about fusions. wanted: --fused; device: the model's, with its index, or meta, which
    stands for a GPU; compiled: torch.compile takes the blocks; cut: ZeRO-3 shards the parameters; asks_base: steps also
    run the model without its adapters."""

    device: torch.device
    wanted: bool = True
    compiled: bool = False
    cut: bool = False
    asks_base: bool = False

    @classmethod
    def of(cls, config: RunConfig, device: torch.device) -> "Setting":
        """The Setting of a run on a device."""
        train = config.train
        return cls(device, train.fused, train.compile, train.stage == 3, config.objective.asks_base)


class Fusion(NamedTuple):
    """A generation's fused form. passes: the operations that share a pass, in words; frozen: prefixes of the parameters
    that must be frozen; kernels: those it needs; misfit(block): why they do not take the block's sizes, or "";
    forward(FeedForward, block, *the block's inputs): the fused forward."""

    passes: str
    frozen: tuple[str, ...]
    kernels: tuple[CudaFamily, ...]
    misfit: Callable[[Any], str]
    forward: Callable[..., Any]


TABLE: Mapping[type[nn.Module], Fusion] = MappingProxyType(
    {
        rwkv6.Block: Fusion(
            "norm with token shift and decay's factor",
            rwkv6.FROZEN,
            (mix.FAMILY, bone.FAMILY),
            rwkv6.misfit,
            rwkv6.forward,
        ),
        rwkv7.Block: Fusion(
            "norm with token shift; wkv7 with keys and bonus",
            rwkv7.FROZEN,
            (mix.FAMILY, bone.FAMILY, wkv7.FAMILY),
            rwkv7.misfit,
            rwkv7.forward,
        ),
    }
)
CHAIN = "bat-in with the squared relu"


def fuse(model: LanguageModel, setting: Setting) -> str:
    """Give each block of a model its fused forward if it can have one -> a line that says how many took it, and why the
    others did not."""
    fusion = TABLE.get(type(model.blocks[0]))
    if fusion is None:
        return "all blocks plain: this generation has no fused form"
    refused = _refusal(setting, fusion)
    done: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    block: Any  # a Block of whichever generation
    for block in model.blocks:
        if reason := refused or _obstacle(block, fusion):
            plain[reason] += 1
            continue
        chain = not setting.asks_base and chains(block.ffn.key, block.ffn.value)
        block.forward = partial(fusion.forward, chained if chain else layer_by_layer, block)
        done[f"{fusion.passes}; {CHAIN}" if chain else fusion.passes] += 1
    total = len(model.blocks)
    words = [f"{number} of {total} blocks: {passes}" for passes, number in done.items()]
    return " | ".join(words + [f"{number} of {total} blocks plain: {reason}" for reason, number in plain.items()])


def _refusal(setting: Setting, fusion: Fusion) -> str:
    """The reason why no block of a run is fused; "" if nothing is in the way."""
    if not setting.wanted:
        return "--fused 0"
    if setting.device.type == "cpu":
        return "fusions are for GPUs"
    if setting.compiled:
        return "--compile fuses by itself"
    if setting.cut:
        return "under stage 3 a parameter is whole only inside its module"
    if setting.device.type == "meta":  # nothing is launched there
        return ""
    return next(filter(None, [kernels.unavailable(setting.device.index) for kernels in fusion.kernels]), "")


def _obstacle(block: nn.Module, fusion: Fusion) -> str:
    """The reason why a block stays plain; "" if nothing is in the way."""
    needed = [(name, one) for name, one in block.named_parameters() if name.startswith(fusion.frozen)]
    if trained := [name for name, parameter in needed if parameter.requires_grad]:
        return f"{trained[0]} trains"
    if others := [parameter.dtype for _, parameter in needed if parameter.dtype != torch.bfloat16]:
        return f"the kernels take only bfloat16, not {others[0]}"
    return fusion.misfit(block)
