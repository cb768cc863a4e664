"""Parts of a model that every generation has."""

from collections.abc import Callable

import torch
from torch import nn

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
