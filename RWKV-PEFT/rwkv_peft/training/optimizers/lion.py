"""Lion (Chen et al. 2023, arXiv 2302.06675), by lion-pytorch: each number moves by the learning rate, up or down, and
has one moment in place of Adam's two."""

from collections.abc import Sequence
from typing import Any

import lion_pytorch
import torch

from ...config import TrainConfig


class Lion(lion_pytorch.Lion):
    by_parameter = True

    @classmethod
    def of(cls, groups: Sequence[dict[str, Any]], train: TrainConfig) -> "Lion":
        return cls(groups, betas=(train.beta1, train.beta2))

    def begin(self, flat: torch.Tensor) -> None:
        self.state[flat]["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
