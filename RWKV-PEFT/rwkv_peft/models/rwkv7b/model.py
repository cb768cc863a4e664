"""RWKV-7 with deep embeddings and attention over them (x070b): beside the recurrence, each layer looks back at all
tokens, through keys and values that low-rank projections make and that factors of the tokens' own scale.

The formulas are those of RWKV-LM's RWKV-v7/rwkv_v7b_demo.py, and so are names and shapes. The demo keeps 32 numbers of
a key and 32 of a value, and makes keys and values of all tokens anew in each call, from factors that it has summed for
the whole vocabulary. Here the finished keys and values are kept, so that the factors can train and a token costs less.
B batch, T time, C channels, D attention_size.

Initialization of a new RWKV-7b: RWKV-7a's, and an attention that adds nothing at first.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...ops.mix import last_token, lerp
from ...ops.products import matmul
from ..parts import LanguageModel, Linear, Table
from ..rwkv7a import model as rwkv7a
from ..state import extended, lengths_on_host
from .keys import DeepState, RWKV7bConfig

BAND = 128  # tokens whose scores are in memory at a time
CAP, SCALE = 64.0, 1024.0  # scores lie between -CAP and CAP


class Attention(nn.Module):
    """Attention of one head, whose keys and values have a factor for each token of the vocabulary."""

    def __init__(self, config: RWKV7bConfig) -> None:
        super().__init__()
        C, D, ones = config.n_embd, config.attention_size, (1,) * (config.shift_axes - 1)
        K, U = config.attention_key_rank, config.attention_value_rank
        self.qq = Linear(C, D, bias=False)
        self.k1, self.k2 = nn.Parameter(torch.empty(C, K)), nn.Parameter(torch.empty(K, D))
        self.v1, self.v2 = nn.Parameter(torch.empty(C, U)), nn.Parameter(torch.empty(U, C))
        self.k_emb, self.k_emb_x = Table(config.vocab_size, D), Linear(C, D, bias=False)
        self.v_emb, self.v_emb_x = Table(config.vocab_size, C), Linear(C, C, bias=False)
        self.x_q, self.x_k = (nn.Parameter(torch.empty(*ones, D)) for _ in range(2))
        self.x_v = nn.Parameter(torch.empty(*ones, C))
        self.lnq, self.lnk, self.lnv = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(C)

    def forward(
        self,
        x: Tensor,
        embedded: Tensor,
        seen: tuple[Tensor, Tensor],
        before: DeepState | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x, embedded (B, T, C), seen by k_emb and v_emb (see Table) -> (B, T, C), and the fields of the state from
        q_shift on, of these tokens alone."""
        q = self.qq(x)
        k = matmul(matmul(x, self.k1), self.k2) * (self.k_emb(seen[0]).to(x) + self.k_emb_x(embedded))
        v = torch.tanh(matmul(matmul(x, self.v1), self.v2)) * (self.v_emb(seen[1]).to(x) + self.v_emb_x(embedded))
        shifts = [last_token(each, cu_seqlens) for each in (q, k, v)]
        last = (None,) * 3 if before is None else (before.q_shift, before.k_shift, before.v_shift)
        amounts, norms = (self.x_q, self.x_k, self.x_v), (self.lnq, self.lnk, self.lnv)
        q, k, v = (
            norm(lerp(each, one, amount.view(1, -1), cu_seqlens=cu_seqlens)[0])
            for each, one, amount, norm in zip((q, k, v), last, amounts, norms)
        )
        length = x.new_full((len(x),), x.shape[1], dtype=torch.long) if cu_seqlens is None else cu_seqlens.diff().long()
        return look_back(q, k, v, before, cu_seqlens), (*shifts, k, v, length)


def look_back(q: Tensor, k: Tensor, v: Tensor, before: DeepState | None, cu_seqlens: Tensor | None) -> Tensor:
    """Let each token look at its sequence so far, which begins with the tokens of the state before: q (B, T, D),
    k (B, T, D), v (B, T, C) -> (B, T, C)."""
    if cu_seqlens is not None:
        sizes = lengths_on_host(cu_seqlens)
        seen = extended(before, {"past_keys": k[0], "past_values": v[0]}, sizes)
        sequences = zip(q[0].split(sizes), seen["past_keys"], seen["past_values"])
        return torch.cat([attend(*(each[None] for each in one)) for one in sequences if len(one[0])], 1)
    if before is None:
        return attend(q, k, v)
    unfilled = before.past_keys.shape[1] - before.length
    return attend(q, torch.cat([before.past_keys, k], 1), torch.cat([before.past_values, v], 1), unfilled)


def attend(q: Tensor, k: Tensor, v: Tensor, unfilled: Tensor | None = None) -> Tensor:
    """Let the last T tokens look at themselves and all before them: q (B, T, D), k (B, S, D), v (B, S, C) -> (B, T, C);
    the first places of a sequence may be unfilled (B,). Backward computes scores again instead of keeping T x S."""
    past, bands = k.shape[1] - q.shape[1], []
    for first in range(0, q.shape[1], BAND):
        rows = q[:, first : first + BAND]
        seen = past + first + rows.shape[1]
        inputs = rows, k[:, :seen], v[:, :seen], unfilled
        if torch.is_grad_enabled():
            bands.append(checkpoint(band, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            bands.append(band(*inputs))
    return torch.cat(bands, 1)


def band(q: Tensor, k: Tensor, v: Tensor, unfilled: Tensor | None) -> Tensor:
    """attend for a few tokens at once."""
    products = matmul(q, k.mT)
    scores = CAP * torch.tanh(products.to(torch.promote_types(products.dtype, torch.float32)) / SCALE)  # (B, T, S)
    place = torch.arange(k.shape[1], device=q.device)
    hidden = place > place[-q.shape[1] :, None]
    if unfilled is not None:
        hidden = hidden | (place < unfilled[:, None, None])
    return matmul(scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v), v)


class Block(rwkv7a.Block):
    """RWKV-7a's block, and attention beside the time mix, on the same x before its norm."""

    def __init__(self, config: RWKV7bConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.qkv = Attention(config)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        v_first: Tensor | None,
        embedded: Tensor | None,
        state: DeepState | None,
        cu_seqlens: Tensor | None,
        of_gate: Tensor,
        of_keys: Tensor,
        of_values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, DeepState]:
        """As RWKV-7a's, with inputs for three tables; the state that comes back has the keys and values of these tokens
        alone."""
        att_shift, wkv, ffn_shift = (None,) * 3 if state is None else state[:3]
        if embedded is None:
            x = embedded = self.ln0(x)
        seen, own = self.qkv(x, embedded, (of_keys, of_values), state, cu_seqlens)
        y, v_first, att_shift, wkv = self.att(self.ln1(x), v_first, att_shift, wkv, cu_seqlens)
        x = x + y + seen
        y, ffn_shift = self.ffn(self.ln2(x), embedded, of_gate, ffn_shift, cu_seqlens)
        return x + y, v_first, embedded, DeepState(att_shift, wkv, ffn_shift, *own)


class RWKV7b(LanguageModel):
    """RWKV-7b language model with RWKV-LM's parameter names."""

    make_block = Block
    carried, tables = rwkv7a.RWKV7a.carried, ("ffn.s_emb", "qkv.k_emb", "qkv.v_emb")


@torch.no_grad()
def init_weights(model: RWKV7b) -> None:
    """Fill every parameter in place; draws from torch's global generator.

    Public code has no recipe for the attention. Here its values' norm starts at zero, and each token's factors at one.
    """
    rwkv7a.init_weights(model)
    for block in model.blocks:
        assert isinstance(block, Block)
        qkv = block.qkv
        for matrix in (qkv.qq.weight, qkv.k1, qkv.k2, qkv.v1, qkv.v2):
            nn.init.orthogonal_(matrix)
        for ones in (qkv.k_emb.weight, qkv.v_emb.weight):
            nn.init.ones_(ones)
        for zeros in (qkv.k_emb_x.weight, qkv.v_emb_x.weight, qkv.lnv.weight):
            nn.init.zeros_(zeros)
        for half in (qkv.x_q, qkv.x_k, qkv.x_v):
            nn.init.constant_(half, 0.5)
