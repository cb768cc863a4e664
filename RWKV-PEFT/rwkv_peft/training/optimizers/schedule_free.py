"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682), by schedulefree: an average of the weights takes the
place of a learning rate that falls, so that a run may end at any step.

Gradients are taken at y, between the average x and the point z that steps lead to. Runs measure and save x.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import schedulefree
import torch

from ...config import TrainConfig


class ScheduleFree(schedulefree.AdamWScheduleFree):
    by_parameter = True

    @classmethod
    def of(cls, groups: Sequence[dict[str, Any]], train: TrainConfig) -> "ScheduleFree":
        optimizer = cls(groups, betas=(train.beta1, train.beta2), eps=train.adam_eps)
        optimizer.train()
        return optimizer

    @property
    def averaging(self) -> bool:
        return not self.param_groups[0]["train_mode"]

    def begin(self, flat: torch.Tensor) -> None:
        z, square = flat.detach().clone(), torch.zeros_like(flat, requires_grad=False)
        self.state[flat] |= {"z": z, "exp_avg_sq": square}

    def go_on(self, rates: Iterable[float]) -> None:
        for group in self.param_groups:
            group |= {"k": 0, "lr_max": -1.0, "weight_sum": 0.0}
        for rate in rates:
            for group in self.param_groups:  # as its steps count, to the bit
                group["lr_max"] = max(rate * group["lr_scale"], group["lr_max"])
                group["weight_sum"] += (group["k"] + 1) ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
                group["k"] += 1
