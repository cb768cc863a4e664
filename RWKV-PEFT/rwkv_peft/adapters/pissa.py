"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that starts from the weight's principal part."""

import torch

from ..config import AdapterConfig
from .method import Params
from .residual import ResidualLora, svd_lowrank


class Pissa(ResidualLora):
    """B0 = U sqrt(S / scale), A0 = sqrt(S / scale) Vᵀ of the weight's leading singular values."""

    name, label, peft = "pissa", "pissa", "pissa"
    json_flag, rank_flag, alpha_key = "pissa_config", "pissa_r in --pissa_config", None
    init_flag = "pissa_init in --pissa_config"

    def initial_factors(
        self, weight: torch.Tensor, config: AdapterConfig, gradient: torch.Tensor | None = None
    ) -> Params:
        weight, rank = weight.detach().float(), config.rank
        if config.svd_niter:
            u, s, v = svd_lowrank(weight, rank, config.svd_niter)
            vt = v.t()
        else:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:rank] / self.scale(config)).sqrt()
        return {"init_lora_A": root[:, None] * vt[:rank], "init_lora_B": u[:, :rank] * root}
