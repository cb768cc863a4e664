"""RWKV-6 ("Finch", x060): the model.

Peng et al. 2024, arXiv 2404.05892, section 4; parameter names and shapes are those of RWKV-LM's
RWKV-v5/src/model.py, so that its .pth files load unchanged.
B batch, T time, C channels (n_embd), A attention channels, F feed-forward channels, H heads, N head size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...ops.mix import gated_residual, lerp, relu_square
from ...ops.wkv6 import wkv6_gated
from ..parts import LanguageModel, MixedNorm, Recurrent, count_sequences
from ..state import LayerState
from .keys import RWKV6Config


class GatedNorm(nn.GroupNorm):
    """Normalizes each head of the recurrence's result and multiplies by silu(gate)."""

    def forward(  # type: ignore[override]
        self,
        rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        u: torch.Tensor,
        gate: torch.Tensor,
        state: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """rows: r k v w (B, T, H, N), which the recurrence takes, and u (H, N); gate (B, T, A) -> (B, T, A), final wkv
        state."""
        return wkv6_gated(rows, u, gate, self.weight, self.bias, self.eps, state, cu_seqlens)


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
        self.output = nn.Linear(A, C, bias=False)
        self.ln_x = GatedNorm(H, A, eps=1e-5 * config.head_size_divisor**2)

    def mix(
        self, x: torch.Tensor, mixed: torch.Tensor, shift: torch.Tensor | None, cu_seqlens: torch.Tensor | None
    ) -> Sequence[torch.Tensor]:
        """Data-dependent lerp between x and its predecessor (eq. 12 to 14), by way of `mixed`, one that is not
        -> w, k, v, r, g inputs, each (B, T, C)."""
        low = torch.tanh(mixed @ self.time_maa_w1)  # (B, T, 5 * maa_rank), order w, k, v, r, g as in time_maa_w2
        maa = torch.cat((self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)).flatten(
            1
        )
        return lerp(x, shift, maa, low, self.time_maa_w2, cu_seqlens)

    def forward(
        self,
        norm: MixedNorm,
        x: torch.Tensor,
        shift: torch.Tensor | None = None,
        wkv_state: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (B, T, C), which `norm` normalizes -> x, output (B, T, C), last normalized token (B, C), final wkv state
        (B, H, N, N)."""
        B, T, _ = x.shape
        x, last, (normal, mixed) = norm(x, None, self.time_maa_x[0], shift, cu_seqlens, whole=True)
        xw, xk, xv, xr, xg = self.mix(normal, mixed, shift, cu_seqlens)
        heads = (B, T, self.n_head, self.head_size)
        r = self.receptance(xr).view(heads)
        k = self.key(xk).view(heads)
        v = self.value(xv).view(heads)
        w = F.linear(torch.tanh(xw @ self.time_decay_w1), self.time_decay_w2.t(), self.time_decay.flatten()).view(heads)
        wkv_state = self.begun(wkv_state, count_sequences(x, cu_seqlens))
        y, wkv_state = self.ln_x((r, k, v, w), self.time_faaaa, self.gate(xg), wkv_state, cu_seqlens)
        return x, self.output(y), last, wkv_state


class ChannelMix(nn.Module):
    """The feed-forward: squared ReLU under a sigmoid gate, on token-shifted input."""

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
        y: torch.Tensor,
        shift: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, y (B, T, C), whose sum `norm` normalizes -> the sum and the feed-forward of it (B, T, C), last normalized
        token (B, C)."""
        maa = torch.cat((self.time_maa_k, self.time_maa_r)).view(2, -1)
        x, last, (xk, xr) = norm(x, y, maa, shift, cu_seqlens)
        value = self.value(relu_square(self.key(xk)))
        return gated_residual(x, self.receptance(xr), value), last


class Block(nn.Module):
    """Pre-norm residual block; block 0 also normalizes the embedding (ln0)."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        if layer == 0:
            self.ln0 = nn.LayerNorm(C)
        self.first = layer == 0
        self.ln1 = MixedNorm(C)
        self.ln2 = MixedNorm(C)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(
        self, x: torch.Tensor, state: LayerState | None = None, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, LayerState]:
        """x (B, T, C), state LayerState or None -> x (B, T, C), LayerState."""
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
        if self.first:
            x = self.ln0(x)
        x, y, att_shift, wkv = self.att(self.ln1, x, att_shift, wkv, cu_seqlens)
        x, ffn_shift = self.ffn(self.ln2, x, y, ffn_shift, cu_seqlens)
        return x, LayerState(att_shift, wkv, ffn_shift)


class RWKV6(LanguageModel):
    """RWKV-6 language model with RWKV-LM's parameter names."""

    make_block = Block
