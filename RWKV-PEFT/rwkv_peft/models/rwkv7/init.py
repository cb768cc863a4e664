"""Initialization of a new RWKV-7, by the recipe of RWKV-LM's RWKV-v7/train_temp/src/model.py (rc4a, 2026)."""

import math

import torch
from torch import nn

from ..parts import LanguageModel, init_around_blocks
from .model import Block

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
