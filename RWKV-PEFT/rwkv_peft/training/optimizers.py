"""The optimizers of --optim, with the state that each has before its first step; packages are imported on use.

OPTIMS (cli/tables.py) has the functions that make an optimizer besides AdamW by their names.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor

from ..cli.errors import UserError, summarize
from ..cli.installing import COMPILER
from ..cli.tables import OPTIMS
from ..config import TrainConfig
from ..ops.native.build import COMPILING
from ..ops.products import addmm_, matmul

BY_RANK = ("adamw8bit",)  # those with a state that is of use to its rank alone
Groups = Sequence[dict[str, Any]]  # as torch's optimizers take them
MOMENTUM = 0.95
SIZE = 0.2  # the root mean square of AdamW's updates, about
ROUNDS, FACTORS = 5, (3.4445, -4.7750, 2.0315)  # of the quintic iteration, chosen for a steep slope at 0


def make_optimizer(groups: Groups, train: TrainConfig) -> Any:
    """Make the optimizer over parameter groups; the engine sets the learning rate before each step."""
    if train.optim != "adamw":
        return OPTIMS[train.optim](groups, train)
    settings = adam_settings(train) | {"lr": train.lr_init}
    return cpu_adam(groups, **settings) if train.offload else torch.optim.AdamW(groups, fused=True, **settings)


def adam_settings(train: TrainConfig) -> dict[str, Any]:
    return {"betas": (train.beta1, train.beta2), "eps": train.adam_eps}


def begin_state(optimizer: Any, flat: Tensor) -> dict[str, Any]:
    """The optimizer's state of a flat tensor of weights; before the first step it is made here, as the optimizer would.

    An optimizer of OPTIMS makes it by `begin`. Its attribute by_parameter is false if its state is no number for each
    number that trains: it is of use to its rank alone.
    """
    state: dict[str, Any] = optimizer.state[flat]
    if state:
        return state
    if hasattr(optimizer, "begin"):
        optimizer.begin(flat)
    else:
        counts_in_tensors = isinstance(optimizer, torch.optim.AdamW)  # DeepSpeed's own counts in numbers
        state["step"] = torch.zeros((), device=flat.device) if counts_in_tensors else 0
        state |= {name: torch.zeros_like(flat, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
    return state


def adamw8bit(groups: Groups, train: TrainConfig) -> Any:
    """AdamW with moments of 8 bits (Dettmers et al. 2021, arXiv 2110.02861), by bitsandbytes: 2 bytes a number that
    trains instead of 8.

    A moment is a code of 8 bits times the largest of a block of 256 numbers. Blocks run across parameters.
    """
    from bitsandbytes.optim import AdamW8bit as Base

    class AdamW8bit(Base):
        by_parameter = False
        param_groups: list[dict[str, Any]]

        def begin(self, flat: Tensor) -> None:
            groups = self.param_groups
            self.param_groups = [groups[0] | {"params": [flat]}]  # in stage 3 the groups are empty between steps
            self.init_state(self.param_groups[0], flat, 0, 0)
            self.param_groups = groups

    return AdamW8bit(groups, **adam_settings(train))


def muon(groups: Groups, train: TrainConfig) -> torch.optim.Optimizer:
    return Muon(groups, **adam_settings(train), fused=True)


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): a matrix is updated by its momentum with
    all singular values near 1. Other tensors, the embedding and the head learn by AdamW. bat-in's and bat-out's blocks
    are matrices each.

    An update is scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982): one learning rate and one weight
    decay serve both. torch.optim.Muon takes whole matrices; ZeRO cuts them. Here ranks gather the momenta of all; each
    computes the matrices that it has a part of.

    groups: matrices have their "shapes", in the order of their parameters (adapters/groups.py).
    """

    def begin(self, flat: Tensor) -> None:
        """Make the state of a flat tensor of weights, as before the first step."""
        state = self.state[flat]
        state["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
        if not any(each is flat for group in self.param_groups if group["shapes"] for each in group["params"]):
            state |= {"step": torch.zeros((), device=flat.device), "exp_avg_sq": torch.zeros_like(state["exp_avg"])}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        for group in groups:
            for flat in group["params"] if group["shapes"] else ():
                self.step_matrices(group, flat)
        self.param_groups = [group for group in groups if not group["shapes"]]
        loss = super().step(closure)
        self.param_groups = groups
        return loss

    def step_matrices(self, group: dict[str, Any], flat: Tensor) -> None:
        """Step this rank's part (n,) of a group's concatenated matrices."""
        assert flat.grad is not None  # because the engine has just set it
        if not self.state[flat]:
            self.begin(flat)
        momentum = self.state[flat]["exp_avg"].lerp_(flat.grad, 1 - MOMENTUM)
        whole, first = gathered_parts(flat.grad.lerp(momentum, MOMENTUM))
        after, place, update = first + len(flat), 0, torch.zeros_like(flat)
        for shape in group["shapes"]:
            end = place + math.prod(shape)
            start, stop = max(place, first), min(end, after)
            if start < stop:
                matrix = orthogonal(whole[place:end].view(shape)).reshape(-1)[start - place : stop - place]
                update[start - first : stop - first] = matrix.float() * (SIZE * math.sqrt(max(shape[-2:])))
            place = end
        flat.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def gathered_parts(part: Tensor) -> tuple[Tensor, int]:
    """(the parts (n,) of all ranks concatenated, the index of this rank's first element)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part, 0
    whole = part.new_empty(dist.get_world_size() * len(part))
    dist.all_gather_into_tensor(whole, part)
    return whole, dist.get_rank() * len(part)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (a, b) or (n, a, b) with their singular values moved to between 0.7 and 1.2, by Newton and Schulz's
    iteration -> bfloat16."""
    # The iteration multiplies x by its transpose: with the short side first, that product is the smaller one.
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    # Frobenius' norm bounds the largest singular value; the iteration converges from at most 1.
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).view(-1, *x.shape[-2:])
    first, third, fifth = FACTORS
    for _ in range(ROUNDS):
        square = matmul(x, x.mT)  # (n, a, a), a the shorter side
        factor = addmm_(square.clone(), square, square, beta=third, alpha=fifth)
        x = addmm_(x.clone(), factor, x, beta=first)
    return (x.mT if tall else x).reshape(matrices.shape)


def cpu_adam(groups: Groups, **settings: Any) -> Any:
    """A DeepSpeedCPUAdam in its AdamW form, for states in CPU memory; its steps depend on its state alone.

    The first on a machine compiles it, in a minute or so, while other processes of this package wait. Raises UserError
    if that is not possible.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    try:
        name = CPUAdamBuilder().name
        build = Path(_get_build_directory(name, verbose=False))
        if not (build / f"{name}.so").exists():
            COMPILING.info("compiling DeepSpeed's Adam for the CPU, a minute or so, once for this machine")
        with FileLock(build / "rwkv_peft.lock"):  # freed when its process ends
            # torch's own lock is a file, which a killed build leaves behind, and every later build waits for it forever
            (build / "lock").unlink(missing_ok=True)
            optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    except (OSError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(
            f"an offload strategy needs DeepSpeed's Adam for the CPU, which cannot be built here: {summarize(cause)}; "
            f"it takes a C++ compiler ({COMPILER}), ninja (pip install ninja) and a folder for torch's extensions that "
            "can be written (TORCH_EXTENSIONS_DIR names another); or take a --strategy without offload"
        ) from error
    optimizer.register_step_pre_hook(forget_powers)
    return optimizer


def forget_powers(optimizer: Any, *_: Any) -> None:
    """Make a DeepSpeedCPUAdam compute the powers of its betas anew in the next step.

    It would multiply the last step's powers by the betas. A resumed run has to compute them and would get other bits.
    An empty update with betas that no run has makes it forget them.
    """
    none = torch.empty(0, dtype=torch.float32)
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 1, 0.0, 1.0, 1.0, 1.0, 0.0, False, none, none, none, none)
