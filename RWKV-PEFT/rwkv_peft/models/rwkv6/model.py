"""RWKV-6 ("Finch", x060): the model.

Peng et al. 2024, arXiv 2404.05892, section 4; parameter names and shapes are those of RWKV-LM's
RWKV-v5/src/model.py, so that its .pth files load unchanged.
B batch, T time, C channels (n_embd), A attention channels, F feed-forward channels, H heads, N head size.

Initialization of a new RWKV-6, by RWKV-LM's x060 recipe (RWKV-v5/src/model.py).
"""

import torch
from torch import Tensor, nn

from ...ops.mix import last_token, lerp, norm_gate, relu_square, sigmoid_gate
from ...ops.products import linear, matmul
from ...ops.wkv6 import wkv6
from ..layout import LayerState
from ..parts import LanguageModel, Linear, Recurrent, Shifted, count_sequences, init_around_blocks
from .keys import RWKV6Config


class GatedNorm(nn.GroupNorm):
    """Normalizes each head and multiplies by silu(gate)."""

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """y (B, T, H, N), gate (B, T, A) -> (B, T, A)."""
        return norm_gate(y, gate, self.weight, self.bias, self.eps)


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
        self.receptance = Linear(C, A, bias=False)
        self.key = Linear(C, A, bias=False)
        self.value = Linear(C, A, bias=False)
        self.gate = Linear(C, A, bias=False)
        self.output = Linear(A, C, bias=False)
        self.ln_x = GatedNorm(H, A, eps=1e-5 * config.head_size_divisor**2)

    def forward(
        self, x: Tensor, shift: Tensor | None = None, wkv_state: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), shift (B, C) or None: the token before -> (B, T, C), last token, wkv state (B, H, N, N)."""
        shift = self.shift_begun(shift, x, cu_seqlens)
        (point,) = lerp(x, shift, self.time_maa_x[0], cu_seqlens=cu_seqlens)
        last = last_token(x, cu_seqlens)
        low = torch.tanh(matmul(point, self.time_maa_w1))  # (B, T, 5 rank): a part for each of the five
        xw, xk, xv, xr, xg = lerp(x, shift, self.maa(), low, self.time_maa_w2, cu_seqlens)  # eq. 12 to 14
        k, v, r, g = self.key(xk), self.value(xv), self.receptance(xr), self.gate(xg)
        w = self.decay(torch.tanh(matmul(xw, self.time_decay_w1)))
        y, wkv_state = self.recur(r, k, v, w, wkv_state, cu_seqlens)
        return self.output(self.ln_x(y, g)), last, wkv_state

    def maa(self) -> Tensor:
        """The five interpolation weights apart from their data-dependent term: (5, C), in time_maa_w2's order."""
        return torch.cat([getattr(self, f"time_maa_{name}") for name in "wkvrg"]).flatten(1)

    def decay(self, low: Tensor) -> Tensor:
        """The decay before its two exponentials: low (B, T, rank) -> (B, T, A)."""
        return linear(low, self.time_decay_w2.t(), self.time_decay.flatten())

    def recur(
        self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, wkv_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """wkv6 of r k v w (B, T, A) -> (B, T, H, N), final state."""
        r, k, v, w = (tensor.unflatten(-1, (self.n_head, self.head_size)) for tensor in (r, k, v, w))
        wkv_state = self.begun(wkv_state, count_sequences(r, cu_seqlens))
        return wkv6(r, k, v, w, self.time_faaaa, wkv_state, cu_seqlens)


class ChannelMix(Shifted):
    """The feed-forward: squared ReLU under a sigmoid gate, on token-shifted input."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        C = config.n_embd
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, config.dim_ffn, bias=False)
        self.receptance = Linear(C, C, bias=False)
        self.value = Linear(config.dim_ffn, C, bias=False)

    def forward(
        self, x: Tensor, shift: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, C), shift (B, C) or None: the token before -> (B, T, C), last token (B, C)."""
        xk, xr = lerp(x, self.shift_begun(shift, x, cu_seqlens), self.maa(), cu_seqlens=cu_seqlens)
        y = self.value(relu_square(self.key(xk)))
        return sigmoid_gate(self.receptance(xr), y), last_token(x, cu_seqlens)

    def maa(self) -> Tensor:
        """The two interpolation weights: (2, C)."""
        return torch.cat((self.time_maa_k, self.time_maa_r)).flatten(1)


class Block(nn.Module):
    """Pre-norm residual block; block 0 also normalizes the embedding (ln0)."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        C = config.n_embd
        if layer == 0:
            self.ln0 = nn.LayerNorm(C)
        self.first = layer == 0
        self.ln1 = nn.LayerNorm(C)
        self.ln2 = nn.LayerNorm(C)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(
        self, x: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """x (B, T, C), state LayerState or None -> (B, T, C), LayerState."""
        att_shift, wkv, ffn_shift = state if state is not None else (None, None, None)
        if self.first:
            x = self.ln0(x)
        y, att_shift, wkv = self.att(self.ln1(x), att_shift, wkv, cu_seqlens)
        x = x + y
        y, ffn_shift = self.ffn(self.ln2(x), ffn_shift, cu_seqlens)
        return x + y, LayerState(att_shift, wkv, ffn_shift)


class RWKV6(LanguageModel):
    """RWKV-6 language model with RWKV-LM's parameter names."""

    make_block = Block


@torch.no_grad()
def init_weights(model: RWKV6) -> None:
    """Fill every parameter in place by RWKV-LM's x060 recipe; draws from torch's global generator.

    The embedding starts tiny, so that after ln0 only its direction matters; every block starts as the identity, because
    output, ffn.receptance and ffn.value start at zero. ffn.time_maa_k and ffn.time_maa_r start at 1 - channel**height,
    as in the recipe until 2024-11.
    """
    config = model.config
    C, A, L = config.n_embd, config.dim_att, config.n_layer
    channel = torch.arange(C) / C  # 0 .. 1 over the channels
    ramp = torch.arange(A) / max(A - 1, 1)
    zigzag = ((torch.arange(A) + 1) % 3 - 1) * 0.1
    init_around_blocks(model)
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        depth = layer / max(L - 1, 1)  # 0 at the first block, 1 at the last
        height = 1 - layer / L  # 1 at the first block, almost 0 at the last
        att, ffn = block.att, block.ffn
        for name, power, shift in (
            ("x", 1, 0),
            ("w", 1, 0),
            ("k", 1, 0),
            ("v", 1, 0.3 * depth),
            ("r", 0.5, 0),
            ("g", 0.5, 0),
        ):
            maa = 1 - (channel ** (power * height) + shift)
            getattr(att, f"time_maa_{name}").copy_(maa.view(1, 1, C))
        nn.init.zeros_(att.time_maa_w1)
        nn.init.uniform_(att.time_maa_w2, -0.01, 0.01)
        att.time_decay.copy_((-6 + 5 * ramp ** (0.7 + 1.3 * depth)).view(1, 1, A))
        nn.init.zeros_(att.time_decay_w1)
        nn.init.uniform_(att.time_decay_w2, -0.01, 0.01)
        att.time_faaaa.copy_((depth * (1 - ramp) + zigzag).view_as(att.time_faaaa))
        att.ln_x.weight.fill_(((1 + layer) / L) ** 0.7)
        for projection, gain in ((att.receptance, 1), (att.key, 0.1), (att.value, 1), (att.gate, 0.1), (ffn.key, 1)):
            nn.init.orthogonal_(projection.weight, gain=gain)
        for projection in (att.output, ffn.receptance, ffn.value):
            nn.init.zeros_(projection.weight)
        for name in ("k", "r"):
            getattr(ffn, f"time_maa_{name}").copy_((1 - channel**height).view(1, 1, C))
