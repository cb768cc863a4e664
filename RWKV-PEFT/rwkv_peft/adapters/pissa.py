"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that starts from the weight's principal part."""

import torch
from torch import Tensor

from ..config import AdapterConfig
from .change import Params
from .method import Alpha
from .residual import residual, svd_lowrank


def make(weight: Tensor, config: AdapterConfig, gradient: Tensor | None) -> Params:
    """B0 = U sqrt(S / scale), A0 = sqrt(S / scale) Vᵀ of the weight's leading singular values."""
    weight, rank = weight.detach().float(), config.rank
    if config.svd_niter:
        u, s, v = svd_lowrank(weight, rank, config.svd_niter)
        vt = v.t()
    else:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / Alpha().scale(config)).sqrt()
    return {"init_lora_A": root[:, None] * vt[:rank], "init_lora_B": u[:, :rank] * root}


METHOD = residual("pissa", make)
