"""RWKV-7 ("Goose", x070): the model.

Peng et al. 2025, arXiv 2503.14456; parameter names and shapes are those of RWKV-LM's RWKV-v7/train_temp/src/model.py,
so that its .pth files load unchanged.
B batch, T time, C channels (n_embd), F feed-forward channels, H heads, N head size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.mix import value_residual
from ...ops.wkv7 import wkv7_gated
from ..parts import (
    AddedLinear,
    Adds,
    LanguageModel,
    MixedNorm,
    Recurrent,
    adds_left,
    bones_of,
    count_sequences,
    feed_forward,
    inputs_of,
)
from ..state import LayerState
from .keys import SHIFTS, RWKV7Config

NORM_EPS = 64e-5  # of ln_x, at every size


class BonusNorm(nn.GroupNorm):
    """Normalizes each head of the recurrence's result, adds the current token's bonus and multiplies by the gate."""

    def forward(  # type: ignore[override]
        self,
        rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        keys: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        v: torch.Tensor,
        g: torch.Tensor,
        r_k: torch.Tensor,
        state: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """rows: r w k v, k before the learning rate has its part, and that one's input; keys: a0, k_k, k_a (1, 1, C); v
        once more, for the bonus (B, T, H, N); g (B, T, C), r_k (H, N) -> (B, T, C), final wkv state."""
        return wkv7_gated(rows, keys, v, g, r_k, self.weight, self.bias, self.eps, state, cu_seqlens)


class TimeMix(Recurrent):
    """Attention's counterpart: token shift, decay and in-context learning rate by low-rank projections, the wkv7
    recurrence, a bonus for the current token, a gate."""

    rows_are_keys = False
    x_r: nn.Parameter  # (1, 1, C), and x_w to x_g: the points
    w0: nn.Parameter  # (1, 1, C), as the other vectors: one 0, two factors 1 (C, rank) and 2 (rank, C) each
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
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = AddedLinear(C, C, bias=False)
        self.ln_x = BonusNorm(H, C, eps=NORM_EPS)

    def forward(
        self,
        norm: MixedNorm,
        x: torch.Tensor,
        v_first: torch.Tensor | None,
        shift: torch.Tensor | None = None,
        wkv_state: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        left: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, C) and what was left of it, which `norm` adds and normalizes, v_first (B, T, C), the values of layer
        0 (None there) -> x plus what attention makes of it (B, T, C), v_first, last normalized token (B, C), final wkv
        state (B, H, N value, N key)."""
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_size)
        amounts = torch.cat([getattr(self, f"x_{name}") for name in SHIFTS]).flatten(1)  # (6, C)
        of_v = SHIFTS.index("v")  # the point that has a second user, but in layer 0
        twice = None if v_first is None else of_v
        layers = {"r": self.receptance, "k": self.key, "v": self.value}
        bones = bones_of([layers.get(name) for name in SHIFTS], x, kept=of_v)
        x, last, points, shifts = norm(x, amounts, shift, cu_seqlens, bones, twice, left)
        xr, (xw, _), xk, xv, (xa, _), (xg, _) = inputs_of(points[: len(bones)], bones, shifts)
        r, k, v = xr.through(self.receptance), xk.through(self.key), xv.through(self.value)
        w = F.linear(torch.tanh(xw @ self.w1), self.w2.t(), self.w0.flatten())
        if v_first is None:
            v_first = v_again = v
        else:
            v, v_again, v_first = value_residual(v, v_first, points[-1] @ self.v1 @ self.v2, self.v0)
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        a = xa @ self.a1 @ self.a2
        r, w, k, v, v_again, a = (tensor.view(heads) for tensor in (r, w, k, v, v_again, a))
        keys = self.a0, self.k_k, self.k_a
        wkv_state = self.begun(wkv_state, count_sequences(x, cu_seqlens))
        y, wkv_state = self.ln_x((r, w, k, v, a), keys, v_again, g, self.r_k, wkv_state, cu_seqlens)
        return self.output(y, x), v_first, last, wkv_state


class ChannelMix(nn.Module):
    """The feed-forward: squared ReLU on token-shifted input."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = AddedLinear(config.dim_ffn, config.n_embd, bias=False)

    def forward(
        self,
        norm: MixedNorm,
        x: torch.Tensor,
        shift: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        adds: Adds | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """x (B, T, C), which `norm` normalizes -> x plus what the feed-forward makes of it (B, T, C), what is left of
        that, where who reads it `adds` that, or None, last normalized token (B, C)."""
        bones = bones_of([self.key], x)
        x, last, points, shifts = norm(x, self.x_k[0], shift, cu_seqlens, bones)
        (key,) = inputs_of(points, bones, shifts)
        return *feed_forward(self.key, self.value, key, x, adds=adds), last


class Block(nn.Module):
    """Pre-norm residual block; block 0 also normalizes the embedding (ln0). What its last layer leaves of x, the next
    one's norm adds."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        if layer == 0:
            self.ln0 = nn.LayerNorm(C)
        self.first = layer == 0
        self.ln1 = MixedNorm(C)
        self.ln2 = MixedNorm(C)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: torch.Tensor,
        left: torch.Tensor | None,
        v_first: torch.Tensor | None,
        state: LayerState | None = None,
        cu_seqlens: torch.Tensor | None = None,
        whole: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, LayerState]:
        """x (B, T, C), what was left of it (n, B T, r) or None, v_first (B, T, C), None in block 0, state LayerState or
        None -> x, what is left of it, None where it is the `whole`, v_first, LayerState."""
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
        if self.first:
            x = self.ln0(x)
        x, v_first, att_shift, wkv = self.att(self.ln1, x, v_first, att_shift, wkv, cu_seqlens, left)
        x, left, ffn_shift = self.ffn(self.ln2, x, ffn_shift, cu_seqlens, None if whole else self.next_adds)
        return x, left, v_first, LayerState(att_shift, wkv, ffn_shift)

    def next_adds(self) -> bool:
        """Whether the next block's ln1, which is as this one's, adds what the feed-forward leaves."""
        return adds_left(self.ln1, self.att.x_r)


class RWKV7(LanguageModel):
    """RWKV-7 language model with RWKV-LM's parameter names."""

    make_block = Block
    carried = (None, None)  # what is left of x, and v_first, which block 0 makes
