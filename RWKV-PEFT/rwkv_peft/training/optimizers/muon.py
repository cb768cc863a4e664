"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): a matrix is updated by its momentum with all
singular values near 1. Other tensors, the embedding and the head learn by AdamW. bat-in's and bat-out's blocks are
matrices each.

An update is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate and one weight
decay serve both. torch.optim.Muon takes whole matrices; ZeRO cuts them. Here ranks gather the momenta of all, and each
computes the matrices that it has a part of.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...config import TrainConfig
from ...ops.products import addmm_, matmul

MOMENTUM = 0.95
SIZE = 0.2  # the root mean square of AdamW's updates, about
ROUNDS, FACTORS = 5, (3.4445, -4.7750, 2.0315)  # of the quintic iteration, chosen for a steep slope at 0


class Muon(torch.optim.AdamW):
    """groups: matrices have their "shapes", in the order of their parameters (adapters/groups.py)."""

    by_parameter = True

    @classmethod
    def of(cls, groups: Sequence[dict[str, Any]], train: TrainConfig) -> "Muon":
        return cls(groups, betas=(train.beta1, train.beta2), eps=train.adam_eps, fused=True)

    def begin(self, flat: Tensor) -> None:
        state = self.state[flat]
        state["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
        if not any(each is flat for group in self.param_groups if group["shapes"] for each in group["params"]):
            state |= {"step": torch.zeros((), device=flat.device), "exp_avg_sq": torch.zeros_like(state["exp_avg"])}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        for group in groups:
            for flat in group["params"] if group["shapes"] else ():
                self.turn(group, flat)
        self.param_groups = [group for group in groups if not group["shapes"]]
        loss = super().step(closure)
        self.param_groups = groups
        return loss

    def turn(self, group: dict[str, Any], flat: Tensor) -> None:
        """Step this rank's part (n,) of a group's matrices, which are concatenated."""
        assert flat.grad is not None  # because the engine has just set it
        if not self.state[flat]:
            self.begin(flat)
        momentum = self.state[flat]["exp_avg"].lerp_(flat.grad, 1 - MOMENTUM)
        whole, first = gathered(flat.grad.lerp(momentum, MOMENTUM))
        after, place, update = first + len(flat), 0, torch.zeros_like(flat)
        for shape in group["shapes"]:
            end = place + math.prod(shape)
            start, stop = max(place, first), min(end, after)
            if start < stop:
                matrix = orthogonal(whole[place:end].view(shape)).reshape(-1)[start - place : stop - place]
                update[start - first : stop - first] = matrix.float() * (SIZE * math.sqrt(max(shape[-2:])))
            place = end
        flat.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def gathered(part: Tensor) -> tuple[Tensor, int]:
    """(the parts (n,) of all ranks concatenated, the index of this rank's first element)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part, 0
    whole = part.new_empty(dist.get_world_size() * len(part))
    dist.all_gather_into_tensor(whole, part)
    return whole, dist.get_rank() * len(part)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (a, b) or (n, a, b) with their singular values moved to between 0.7 and 1.2, by Newton and Schulz's
    iteration -> bfloat16."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).view(-1, *x.shape[-2:])
    first, third, fifth = FACTORS
    for _ in range(ROUNDS):
        square = matmul(x, x.mT)
        factor = addmm_(square.clone(), square, square, beta=third, alpha=fifth)
        x = addmm_(x.clone(), factor, x, beta=first)
    return (x.mT if tall else x).reshape(matrices.shape)
