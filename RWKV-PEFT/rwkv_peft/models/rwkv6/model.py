"""RWKV-6 ("Finch", x060): the model.

Peng et al. 2024, arXiv 2404.05892, section 4; parameter names and shapes are those of RWKV-LM's
RWKV-v5/src/model.py, so that its .pth files load unchanged.
B batch, T time, C channels (n_embd), A attention channels, F feed-forward channels, H heads, N head size.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ...ops.mix import Asked, gated_residual, norm_ddlerp
from ...ops.wkv6 import wkv6_gated
from ..parts import (
    AddedLinear,
    Adds,
    Input,
    LanguageModel,
    MixedNorm,
    Recurrent,
    adds_left,
    bones_of,
    count_sequences,
    feed_forward,
    inputs_of,
    unshifted,
)
from ..state import LayerState
from .keys import RWKV6Config


class GatedNorm(nn.GroupNorm):
    """Normalizes each head of the recurrence's result and multiplies by silu(gate)."""

    def forward(  # type: ignore[override]
        self,
        rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        decay: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        u: torch.Tensor,
        gate: torch.Tensor,
        state: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """rows: r k v (B, T, H, N), which the recurrence takes, and u (H, N); decay: low (B, T, D), up (D, A) and a
        parameter (1, 1, A), of which its w is made; gate (B, T, A) -> (B, T, A), final wkv state."""
        return wkv6_gated(rows, decay, u, gate, self.weight, self.bias, self.eps, state, cu_seqlens)


class DataMixedNorm(nn.LayerNorm):
    """Adds to a residual, normalizes the sum, and moves each of its tokens towards the one before, by weights that
    depend on both (eq. 12 to 14)."""

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        gate: torch.Tensor | None,
        shift: torch.Tensor | None,
        maa_x: torch.Tensor,
        w1: torch.Tensor,
        maa: torch.Tensor,
        w2: torch.Tensor,
        decay_w1: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        bones: Sequence[Asked],
        lefts: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """x, y and gate (B, T, C), or y and gate None, shift (B, C) or None, what precedes the norm's first token,
        norm_ddlerp's parameters, and what layers left of y and gate, or None each -> x + sigmoid(gate) y, the norm's
        last token (B, C), the decay's factor of low rank (B, T, rank), the inputs of k, v, r, g (B, T, C), the shifts
        that come of their bones."""
        norm = self.weight, self.bias, self.eps
        return norm_ddlerp(x, y, gate, *norm, shift, maa_x, w1, maa, w2, decay_w1, cu_seqlens, *lefts, bones=bones)


class TimeMix(Recurrent):
    """Attention's counterpart: data-dependent token shift, data-dependent decay, the wkv6 recurrence."""

    rows_are_keys = True
    time_maa_x: nn.Parameter
    time_maa_w: nn.Parameter
    time_maa_k: nn.Parameter
    time_maa_v: nn.Parameter
    time_maa_r: nn.Parameter
    time_maa_g: nn.Parameter

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        C, A, H, N = config.n_embd, config.dim_att, config.n_head, config.head_size
        self.n_head, self.head_size = H, N
        for name in ("x", "w", "k", "v", "r", "g"):
            self.register_parameter(f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * config.maa_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, config.maa_rank, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, A))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, A))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        self.receptance = nn.Linear(C, A, bias=False)
        self.key = nn.Linear(C, A, bias=False)
        self.value = nn.Linear(C, A, bias=False)
        self.gate = nn.Linear(C, A, bias=False)
        self.output = AddedLinear(A, C, bias=False)
        self.ln_x = GatedNorm(H, A, eps=1e-5 * config.head_size_divisor**2)

    def forward(
        self,
        norm: DataMixedNorm,
        x: torch.Tensor,
        y: torch.Tensor | None,
        gate: torch.Tensor | None,
        shift: torch.Tensor | None = None,
        wkv_state: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        lefts: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        adds: Adds | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """x, y and gate (B, T, C), or y and gate None, and lefts of y and gate, of which `norm` normalizes x +
        sigmoid(gate) y -> that sum plus what attention makes of it (B, T, C), what is left of that, where who reads it
        `adds` that, or None, last normalized token (B, C), final wkv state (B, H, N, N)."""
        B, T, _ = x.shape
        maa = torch.cat([getattr(self, f"time_maa_{name}") for name in "wkvrg"]).flatten(1)  # (5, C), as time_maa_w2
        factors = self.time_maa_x[0], self.time_maa_w1, maa, self.time_maa_w2, self.time_decay_w1
        layers = self.key, self.value, self.receptance, self.gate
        bones = bones_of(layers, x)
        x, last, low, points, shifts = norm(x, y, gate, shift, *factors, cu_seqlens, bones, lefts)
        k, v, r, g = (one.through(layer) for layer, one in zip(layers, inputs_of(points, bones, shifts), strict=True))
        r, k, v = (tensor.view(B, T, self.n_head, self.head_size) for tensor in (r, k, v))
        decay = low, self.time_decay_w2, self.time_decay
        wkv_state = self.begun(wkv_state, count_sequences(x, cu_seqlens))
        y, wkv_state = self.ln_x((r, k, v), decay, self.time_faaaa, g, wkv_state, cu_seqlens)
        return *unshifted(self.output, Input(y), x, adds=adds), last, wkv_state


class ChannelMix(nn.Module):
    """The feed-forward: squared ReLU, and the sigmoid gate that it goes under, on token-shifted input."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        C = config.n_embd
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, config.dim_ffn, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(config.dim_ffn, C, bias=False)

    def forward(
        self,
        norm: MixedNorm,
        x: torch.Tensor,
        left: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        adds: Adds | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
        """x (B, T, C) and what was left of it, which `norm` adds and normalizes -> x, what the feed-forward makes of
        it, and the gate of that before its sigmoid (B, T, C), what is left of these two, where who reads them `adds`
        that, or None each, last normalized token (B, C)."""
        maa = torch.cat((self.time_maa_k, self.time_maa_r)).view(2, -1)
        bones = bones_of((self.key, self.receptance), x)
        x, last, points, shifts = norm(x, maa, shift, cu_seqlens, bones, left=left)
        key, receptance = inputs_of(points, bones, shifts)
        y, left_y = feed_forward(self.key, self.value, key, adds=adds)
        gate, left_gate = unshifted(self.receptance, receptance, adds=adds)
        return x, y, gate, left_y, left_gate, last


class Block(nn.Module):
    """Pre-norm residual block; block 0 also normalizes the embedding (ln0). What its feed-forward makes it leaves for
    the next one's norm to add: sigmoid(gate) y, and what layers left of both."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        if layer == 0:
            self.ln0 = nn.LayerNorm(C)
        self.first = layer == 0
        self.ln1 = DataMixedNorm(C)
        self.ln2 = MixedNorm(C)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        gate: torch.Tensor | None,
        left_y: torch.Tensor | None,
        left_gate: torch.Tensor | None,
        state: LayerState | None = None,
        cu_seqlens: torch.Tensor | None = None,
        whole: bool = False,
    ) -> tuple[torch.Tensor | LayerState | None, ...]:
        """x, y, gate (B, T, C), the last two None in block 0, what was left of these (n, B T, r) or None each, state
        LayerState or None -> x, y, gate, what is left of these, None all four where x is the `whole`, LayerState."""
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
        if self.first:
            x = self.ln0(x)
        lefts = left_y, left_gate
        x, left, att_shift, wkv = self.att(self.ln1, x, y, gate, att_shift, wkv, cu_seqlens, lefts, self.adds_here)
        x, *carried, ffn_shift = self.ffn(self.ln2, x, left, ffn_shift, cu_seqlens, None if whole else self.next_adds)
        if whole:
            y, gate, *_ = carried
            x, carried = gated_residual(x, gate, y), [None] * 4
        return x, *carried, LayerState(att_shift, wkv, ffn_shift)

    def adds_here(self) -> bool:
        """Whether ln2 adds what attention leaves."""
        return adds_left(self.ln2, self.ffn.time_maa_k)

    def next_adds(self) -> bool:
        """Whether the next block's ln1, which is as this one's, adds what the feed-forward leaves."""
        return adds_left(self.ln1, self.att.time_maa_x)


class RWKV6(LanguageModel):
    """RWKV-6 language model with RWKV-LM's parameter names."""

    make_block = Block
    carried = (None, None, None, None)  # y and gate, and what is left of them
