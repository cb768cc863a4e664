"""OLoRA (Büyükakyüz 2024, arXiv 2406.01775): LoRA that starts from the weight's QR decomposition."""

import torch

from .residual import ResidualLora


class Olora(ResidualLora):
    """B0 = Q[:, :rank], A0 = R[:rank]."""

    name, label, peft = "olora", "olora", "olora"

    def initial_factors(self, weight, config, gradient=None):
        q, r = torch.linalg.qr(weight.detach().float())
        return {"init_lora_A": r[: config.rank], "init_lora_B": q[:, : config.rank]}
