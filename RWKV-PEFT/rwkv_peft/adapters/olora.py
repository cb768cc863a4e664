"""OLoRA (Büyükakyüz 2024, arXiv 2406.01775): LoRA that starts from the weight's QR decomposition."""

import torch
from torch import Tensor

from ..config import AdapterConfig
from .change import Params
from .residual import residual


def make(weight: Tensor, config: AdapterConfig, gradient: Tensor | None) -> Params:
    """B0 = Q[:, :rank], A0 = R[:rank]."""
    q, r = torch.linalg.qr(weight.detach().float())
    return {"init_lora_A": r[: config.rank], "init_lora_B": q[:, : config.rank]}


METHOD = residual("olora", make)
