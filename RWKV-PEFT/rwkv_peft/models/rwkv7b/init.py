"""Initialization of a new RWKV-7b: RWKV-7a's, and an attention that adds nothing at first."""

import torch
from torch import nn

from ..rwkv7a import init
from .model import Block, RWKV7b


@torch.no_grad()
def init_weights(model: RWKV7b) -> None:
    """Fill every parameter in place; draws from torch's global generator.

    Public code has no recipe for the attention. Here its values' norm starts at zero, and each token's factors at one.
    """
    init.init_weights(model)
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
