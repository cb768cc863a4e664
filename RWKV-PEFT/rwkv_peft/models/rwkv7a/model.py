"""RWKV-7 with deep embeddings (x070a): in each layer a token's own small matrix scales the feed-forward.

The formulas are those of RWKV-LM's RWKV-v7/rwkv_v7a_demo.py, and so are names and shapes. The demo adds s_emb_x of the
normalized embedding to s_emb once, for the whole vocabulary; here it is added token by token, so that it trains, too.
B batch, T time, C channels, F feed-forward channels, D deep_size.

Initialization of a new RWKV-7a: RWKV-7's, and a gate that starts at one, whatever the token.
"""

import torch
from torch import Tensor, nn

from ...ops.mix import last_token, lerp, relu_square
from ...ops.products import matmul
from ..layout import LayerState
from ..parts import LanguageModel, Linear, Table
from ..rwkv7 import model as rwkv7
from .keys import RWKV7aConfig


class ChannelMix(rwkv7.ChannelMix):
    """RWKV-7's feed-forward, with a gate between its layers: low-rank in the input, through the token's matrix."""

    def __init__(self, config: RWKV7aConfig) -> None:
        super().__init__(config)
        C, F, D = config.n_embd, config.dim_ffn, config.deep_size
        self.s_emb = Table(config.vocab_size, D * D)
        self.s_emb_x = Linear(C, D * D, bias=False)
        self.s1 = nn.Parameter(torch.empty(C, D))
        self.s2 = nn.Parameter(torch.empty(D, F))
        self.s0 = nn.Parameter(torch.empty(1, 1, F))

    def forward(  # type: ignore[override]
        self, x: Tensor, embedded: Tensor, seen: Tensor, shift: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, embedded (B, T, C), seen by s_emb (see Table), shift (B, C) or None: the token before -> (B, T, C), last
        token."""
        (xk,) = lerp(x, self.shift_begun(shift, x, cu_seqlens), self.x_k[0], cu_seqlens=cu_seqlens)
        k = relu_square(self.key(xk)) * self.gate(x, embedded, seen)
        return self.value(k), last_token(x, cu_seqlens)

    def gate(self, x: Tensor, embedded: Tensor, seen: Tensor) -> Tensor:
        """x s1 M s2 + s0 (B, T, F), with each token's matrix M (D, D)."""
        D = self.s1.shape[1]
        matrix = (self.s_emb(seen).to(x) + self.s_emb_x(embedded)).unflatten(-1, (D, D))  # (B, T, D, D)
        row = matmul(matmul(x, self.s1).unsqueeze(-2), matrix)  # (B, T, 1, D)
        return matmul(row.squeeze(-2), self.s2) + self.s0


class Block(rwkv7.Block):
    """RWKV-7's block, with a feed-forward that sees the tokens and their normalized embeddings."""

    ffn: ChannelMix

    def __init__(self, config: RWKV7aConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.ffn = ChannelMix(config)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        v_first: Tensor | None,
        embedded: Tensor | None,
        state: LayerState | None,
        cu_seqlens: Tensor | None,
        seen: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, LayerState]:
        """x (B, T, C), v_first and embedded (B, T, C), None in block 0, state LayerState or None, tokens (B, T) or
        their rows of the table -> x, v_first, embedded, LayerState."""
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
        if embedded is None:
            x = embedded = self.ln0(x)
        y, v_first, att_shift, wkv = self.att(self.ln1(x), v_first, att_shift, wkv, cu_seqlens)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), embedded, seen, ffn_shift, cu_seqlens)
        return x + y, v_first, embedded, LayerState(att_shift, wkv, ffn_shift)


class RWKV7a(LanguageModel):
    """RWKV-7a language model with RWKV-LM's parameter names."""

    make_block = Block
    carried = (None, None)  # v_first and the normalized embedding, which block 0 makes
    tables = ("ffn.s_emb",)


@torch.no_grad()
def init_weights(model: LanguageModel) -> None:
    """Fill every parameter in place; draws from torch's global generator.

    Public code has no recipe for the deep embeddings. These start as RWKV-7's low-rank projections do, the first factor
    at zero, around an identity for each token.
    """
    rwkv7.init_weights(model)
    for block in model.blocks:
        assert isinstance(block, Block)
        ffn = block.ffn
        identity = torch.eye(ffn.s1.shape[1])
        ffn.s_emb.weight.copy_(identity.flatten().expand_as(ffn.s_emb.weight))
        for zeros in (ffn.s_emb_x.weight, ffn.s1):
            nn.init.zeros_(zeros)
        nn.init.orthogonal_(ffn.s2, gain=0.1)
        nn.init.ones_(ffn.s0)
