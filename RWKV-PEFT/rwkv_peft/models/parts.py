"""Parts of a model that every generation has: what stands around its blocks, and how that starts."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from .state import State

HeadFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, weight of the head) -> what stands for logits


def last_token(x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """The last token of each sequence of x (B, T, C) -> (B, C), or (n, C) where cu_seqlens packs n of them."""
    return x[:, -1] if cu_seqlens is None else x[0, cu_seqlens[1:].long() - 1]


class Head(nn.Linear):
    """The output projection, which can hand its weight to a function instead of forming the logits.

    A loss that walks the vocabulary in chunks needs the weight itself; reaching it through the module's forward
    keeps ZeRO-3's gathering hooks in the path.
    """

    def forward(self, x: torch.Tensor, function: HeadFunction | None = None) -> torch.Tensor:
        """x (B, T, C) -> logits (B, T, V), or function(x, weight)."""
        return super().forward(x) if function is None else function(x, self.weight)


class LanguageModel(nn.Module):
    """Embedding, blocks, norm and head, under RWKV-LM's parameter names. A generation says what its blocks are:
    make_block(config, layer), called as block(x, *carried, state, cu_seqlens) -> (x, *carried, LayerState); carried is
    what the first of them is given of what blocks hand on besides x.

    grad_checkpoint recomputes each block in the backward pass instead of keeping its activations. Parameters are
    empty until `init_weights` or `load_state_dict` fills them.
    """

    make_block: Callable[[Any, int], nn.Module]
    carried: tuple[None, ...] = ()

    def __init__(self, config: ModelConfig, grad_checkpoint: bool = False) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpoint = grad_checkpoint
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(self.make_block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = Head(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: torch.Tensor,
        state: State | None = None,
        cu_seqlens: torch.Tensor | None = None,
        head: HeadFunction | None = None,
    ) -> tuple[torch.Tensor, State]:
        """tokens (B, T) int64, state State or None -> logits (B, T, V), State.

        cu_seqlens (n + 1,) marks the boundaries of n sequences packed in one row (B = 1, state for n sequences);
        nothing crosses them. `head(x, weight)`, where given, takes the place of the logits (see Head).
        """
        x, carried = self.emb(tokens), self.carried
        states = []
        for layer, block in enumerate(self.blocks):
            inputs = (x, *carried, None if state is None else state[layer], cu_seqlens)
            if self.grad_checkpoint and torch.is_grad_enabled():
                x, *carried, layer_state = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, *carried, layer_state = block(*inputs)
            states.append(layer_state)
        return self.head(self.ln_out(x), head), State(states)


@torch.no_grad()
def init_around_blocks(model: LanguageModel) -> None:
    """Start the embedding tiny, so that ln0 makes its direction, not its size, what matters; the head orthogonal; and
    every norm as the identity. Draws from torch's global generator."""
    config = model.config
    nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)
    nn.init.orthogonal_(model.head.weight, gain=0.5 * math.sqrt(max(config.vocab_size / config.n_embd, 1)))
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
