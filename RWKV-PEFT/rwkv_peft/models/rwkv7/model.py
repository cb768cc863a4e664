"""RWKV-7 ("Goose", x070): the model.

Peng et al. 2025, arXiv 2503.14456; parameter names and shapes are those of RWKV-LM's RWKV-v7/train_temp/src/model.py,
so that its .pth files load unchanged.
B batch, T time, C channels (n_embd), F feed-forward channels, H heads, N head size.

Initialization of a new RWKV-7, by the recipe of RWKV-LM's RWKV-v7/train_temp/src/model.py (rc4a, 2026).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...ops.mix import delta_keys, last_token, lerp, norm_bonus_gate, relu_square, value_residual
from ...ops.products import linear, matmul
from ...ops.wkv7 import wkv7
from ..layout import LayerState
from ..parts import LanguageModel, Linear, Recurrent, Shifted, count_sequences, init_around_blocks
from .keys import SHIFTS, RWKV7Config

NORM_EPS = 64e-5  # of ln_x, at every size


class BonusNorm(nn.GroupNorm):
    """Normalizes each head, adds the current token's bonus and multiplies by the gate."""

    def forward(  # type: ignore[override]
        self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor
    ) -> Tensor:
        """y r k v (B, T, H, N), g (B, T, C), r_k (H, N) -> (B, T, C)."""
        return norm_bonus_gate(y, r, k, v, g, (r_k, self.weight, self.bias), self.eps)


class TimeMix(Recurrent):
    """Attention's counterpart: token shift, decay and in-context learning rate by low-rank projections, the wkv7
    recurrence, a bonus for the current token, a gate."""

    rows_are_keys = False
    x_r: nn.Parameter  # (1, 1, C), as x_w to x_g: the interpolation weights
    w0: nn.Parameter  # (1, 1, C), the vector beside the factors w1 (C, rank) and w2 (rank, C); a, v and g likewise
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter
    a1: nn.Parameter
    a2: nn.Parameter
    v0: nn.Parameter
    v1: nn.Parameter
    v2: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        C, H, N = config.n_embd, config.n_head, config.head_size
        self.n_head, self.head_size = H, N
        vectors = [f"x_{name}" for name in SHIFTS] + ["w0", "a0", "k_k", "k_a"]
        ranks = {"w": config.decay_rank, "a": config.iclr_rank, "g": config.gate_rank}
        if layer > 0 or config.first_value:
            vectors.append("v0")
            ranks["v"] = config.value_rank
        for name in vectors:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, C)))
        for name, rank in ranks.items():
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(C, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, C)))
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.receptance = Linear(C, C, bias=False)
        self.key = Linear(C, C, bias=False)
        self.value = Linear(C, C, bias=False)
        self.output = Linear(C, C, bias=False)
        self.ln_x = BonusNorm(H, C, eps=NORM_EPS)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        shift: Tensor | None = None,
        wkv_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, C), v_first (B, T, C), the values of layer 0 (None there), shift (B, C) or None: the token before
        -> (B, T, C), v_first, last token (B, C), final wkv state (B, H, N value, N key)."""
        points = lerp(x, self.shift_begun(shift, x, cu_seqlens), self.amounts(), cu_seqlens=cu_seqlens)
        r, w, k, v, a, g, v_first = self.projected(points, v_first)
        heads = (*x.shape[:2], self.n_head, self.head_size)
        r, w, k, a = (tensor.view(heads) for tensor in (r, w, k, a))
        k, removed, written = delta_keys(k, a, self.a0, self.k_k, self.k_a)
        wkv_state = self.begun(wkv_state, count_sequences(x, cu_seqlens))
        y, wkv_state = wkv7(r, w, k, v.view(heads), removed, written, wkv_state, cu_seqlens)
        y = self.ln_x(y, r, k, v.view(heads), g, self.r_k)
        return self.output(y), v_first, last_token(x, cu_seqlens), wkv_state

    def amounts(self) -> Tensor:
        """The six interpolation weights, from each token (0) to the one before (1): (6, C)."""
        return torch.cat([getattr(self, f"x_{name}") for name in SHIFTS]).flatten(1)

    def projected(self, points: Sequence[Tensor], v_first: Tensor | None) -> tuple[Tensor, ...]:
        """Six shifted inputs and v_first, the values of layer 0 (None in layer 0) -> r, the decay w before its sigmoid,
        k, v, the in-context learning rate a before its sigmoid and without a0, the gate g, v_first; (B, T, C)."""
        xr, xw, xk, xv, xa, xg = points
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = linear(torch.tanh(matmul(xw, self.w1)), self.w2.t(), self.w0.flatten())
        if v_first is None:
            v_first = v
        else:
            v = value_residual(v, v_first, matmul(matmul(xv, self.v1), self.v2), self.v0)
        g = matmul(torch.sigmoid(matmul(xg, self.g1)), self.g2)
        a = matmul(matmul(xa, self.a1), self.a2)
        return r, w, k, v, a, g, v_first


class ChannelMix(Shifted):
    """The feed-forward: squared ReLU on token-shifted input."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(
        self, x: Tensor, shift: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) or None: the token before -> (B, T, C), last token (B, C)."""
        (xk,) = lerp(x, self.shift_begun(shift, x, cu_seqlens), self.x_k[0], cu_seqlens=cu_seqlens)
        return self.value(relu_square(self.key(xk))), last_token(x, cu_seqlens)


class Block(nn.Module):
    """Pre-norm residual block; block 0 also normalizes the embedding (ln0)."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        if layer == 0:
            self.ln0 = nn.LayerNorm(C)
        self.first = layer == 0
        self.ln1 = nn.LayerNorm(C)
        self.ln2 = nn.LayerNorm(C)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self, x: Tensor, v_first: Tensor | None, state: LayerState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, LayerState]:
        """x (B, T, C), v_first (B, T, C), None in block 0, state LayerState or None -> x, v_first, LayerState."""
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
        if self.first:
            x = self.ln0(x)
        y, v_first, att_shift, wkv = self.att(self.ln1(x), v_first, att_shift, wkv, cu_seqlens)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), ffn_shift, cu_seqlens)
        return x + y, v_first, LayerState(att_shift, wkv, ffn_shift)


class RWKV7(LanguageModel):
    """RWKV-7 language model with RWKV-LM's parameter names."""

    make_block = Block
    carried = (None,)  # v_first, which block 0 makes


# (name of a token-shift amount, its power of the channel in the first block)
SHIFT_POWERS = (("x_r", 0.2), ("x_w", 0.9), ("x_k", 0.7), ("x_v", 0.7), ("x_a", 0.9), ("x_g", 0.2))


@torch.no_grad()
def init_weights(model: LanguageModel) -> None:
    """Fill every parameter of a model of these blocks in place; draws from torch's global generator.

    The embedding starts tiny, so that after ln0 only its direction matters; every block starts as the identity, because
    output and ffn.value start at zero. The first factors of all low-rank projections start at zero, too.
    """
    config = model.config
    C, N, L = config.n_embd, config.head_size, config.n_layer
    index = torch.arange(C)
    channel, linear = index / C, index / max(C - 1, 1) - 0.5
    within = (index % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = within * within.abs()
    init_around_blocks(model)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        depth = layer / max(L - 1, 1)  # 0 at the first block, 1 at the last
        height = 1 - layer / L  # 1 at the first block, almost 0 at the last
        att, ffn = block.att, block.ffn
        for name, power in SHIFT_POWERS:
            getattr(att, name).copy_((1 - channel ** (power * height)).view(1, 1, C))
        ffn.x_k.copy_((1 - channel ** (height**4)).view(1, 1, C))
        decay = -6 + 6 * (index / max(C - 1, 1)) ** (1 + depth**0.3)
        vectors = {
            "w0": decay + 0.5 + 2.5 * zigzag,
            "a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
            "v0": 0.73 - 0.4 * linear,
            "k_k": 0.71 - 0.1 * linear,
            "k_a": torch.full((C,), 1.02),
        }
        for name, values in vectors.items():
            if hasattr(att, name):
                getattr(att, name).copy_(values.view(1, 1, C))
        att.r_k.fill_(-0.04)
        for name in "wavg":
            if hasattr(att, f"{name}1"):
                nn.init.zeros_(getattr(att, f"{name}1"))
                second = getattr(att, f"{name}2")  # (rank, C)
                nn.init.orthogonal_(second, gain=0.1 * math.sqrt(max(second.shape[0] / second.shape[1], 1)))
        att.ln_x.weight.fill_(((1 + layer) / L) ** 0.7)
        for matrix, gain in ((att.receptance, 1), (att.key, 0.1), (att.value, 1), (ffn.key, 1)):
            nn.init.orthogonal_(matrix.weight, gain=gain)
        for matrix in (att.output, ffn.value):
            nn.init.zeros_(matrix.weight)
