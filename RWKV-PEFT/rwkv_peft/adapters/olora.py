"""OLoRA (Büyükakyüz 2024, arXiv 2406.01775): LoRA that starts from the weight's QR decomposition."""

import torch

from ..config import AdapterConfig
from .method import Params
from .residual import ResidualLora


class Olora(ResidualLora):
    """B0 = Q[:, :rank], A0 = R[:rank]."""

    name, label, peft = "olora", "olora", "olora"

    def initial_factors(
        self, weight: torch.Tensor, config: AdapterConfig, gradient: torch.Tensor | None = None
    ) -> Params:
        q, r = torch.linalg.qr(weight.detach().float())
        return {"init_lora_A": r[: config.rank], "init_lora_B": q[:, : config.rank]}
