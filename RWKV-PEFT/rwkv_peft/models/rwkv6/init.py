"""Initialization of a new RWKV-6, by RWKV-LM's x060 recipe (RWKV-v5/src/model.py)."""

import torch
from torch import nn

from ..parts import init_around_blocks
from .model import RWKV6, Block


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
        for linear, gain in ((att.receptance, 1), (att.key, 0.1), (att.value, 1), (att.gate, 0.1), (ffn.key, 1)):
            nn.init.orthogonal_(linear.weight, gain=gain)
        for linear in (att.output, ffn.receptance, ffn.value):
            nn.init.zeros_(linear.weight)
        for name in ("k", "r"):
            getattr(ffn, f"time_maa_{name}").copy_((1 - channel**height).view(1, 1, C))
