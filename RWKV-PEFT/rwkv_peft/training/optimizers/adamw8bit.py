"""AdamW with moments of 8 bits (Dettmers et al. 2021, arXiv 2110.02861), by bitsandbytes: 2 bytes a number that trains,
and not 8.

A moment is a code of 8 bits times the largest of a block of 256 numbers. Blocks run across parameters, so that a rank's
state is of use to that rank alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit as Base

from ...config import TrainConfig


class AdamW8bit(Base):
    by_parameter = False
    param_groups: list[dict[str, Any]]

    @classmethod
    def of(cls, groups: Sequence[dict[str, Any]], train: TrainConfig) -> "AdamW8bit":
        return cls(groups, betas=(train.beta1, train.beta2), eps=train.adam_eps)

    def begin(self, flat: torch.Tensor) -> None:
        groups = self.param_groups
        self.param_groups = [groups[0] | {"params": [flat]}]  # in stage 3 the groups are empty between steps
        self.init_state(self.param_groups[0], flat, 0, 0)
        self.param_groups = groups
