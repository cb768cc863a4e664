"""Initialization of a new RWKV-7a: RWKV-7's, and a gate that starts at one, whatever the token."""

import torch
from torch import nn

from ..parts import LanguageModel
from ..rwkv7 import init
from .model import Block


@torch.no_grad()
def init_weights(model: LanguageModel) -> None:
    """Fill every parameter in place; draws from torch's global generator.

    Public code has no recipe for the deep embeddings. These start as RWKV-7's low-rank projections do, the first factor
    at zero, around an identity for each token.
    """
    init.init_weights(model)
    for block in model.blocks:
        assert isinstance(block, Block)
        ffn = block.ffn
        identity = torch.eye(ffn.s1.shape[1])
        ffn.s_emb.weight.copy_(identity.flatten().expand_as(ffn.s_emb.weight))
        for zeros in (ffn.s_emb_x.weight, ffn.s1):
            nn.init.zeros_(zeros)
        nn.init.orthogonal_(ffn.s2, gain=0.1)
        nn.init.ones_(ffn.s0)
