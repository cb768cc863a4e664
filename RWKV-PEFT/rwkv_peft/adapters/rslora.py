"""rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): LoRA whose scale falls with the square root of its rank, so that what
a step changes does not shrink as the rank grows."""

import math

from ..config import AdapterConfig
from .lora import Lora


class RsLora(Lora):
    """W' = W + alpha / sqrt(rank) B A. Its files are LoRA's: they hold the scale."""

    name, label, peft, saved_as = "rslora", "rslora", "rslora", "lora"

    def scale(self, config: AdapterConfig) -> float:
        return config.alpha / math.sqrt(config.rank) if config.alpha else 1.0

    def alpha(self, scale: float, rank: int) -> float:
        return scale * math.sqrt(rank)
