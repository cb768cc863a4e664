"""LoRA-GA (Wang et al. 2024, arXiv 2407.05000): LoRA that starts from the gradient of the loss."""

import math

from torch import Tensor

from ..cli.errors import UserError
from ..config import AdapterConfig
from .change import Params
from .method import Method
from .residual import residual, svd_lowrank

GAMMA = 16  # the paper's stable scale


def make(weight: Tensor, config: AdapterConfig, gradient: Tensor | None) -> Params:
    """A0 from the gradient's first `rank` right singular vectors, B0 from the next left ones, stably scaled."""
    if gradient is None:
        raise UserError(
            "lora-ga starts from the gradient of the loss at each weight, and none was given for this one; "
            "estimate it on a batch of the data first, or use --peft pissa, which needs none"
        )
    rank = config.rank
    u, _, v = svd_lowrank(gradient.float(), 2 * rank, niter=4)
    scale = gradient.shape[0] ** 0.25 / math.sqrt(GAMMA)
    return {"init_lora_A": scale * v.t()[:rank], "init_lora_B": scale * u[:, rank : 2 * rank]}


def step(method: Method, config: AdapterConfig, in_features: int) -> float:
    """The factors have rows and columns of the length `scale` of `make`, here of a square layer."""
    return method.scale(config) * math.sqrt(2 * config.rank / (GAMMA * math.sqrt(in_features)))


METHOD = residual("lora-ga", make, step, most=lambda *layer: min(layer) // 2, from_gradient=True)
