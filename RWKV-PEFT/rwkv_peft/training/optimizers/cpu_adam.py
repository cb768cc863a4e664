"""DeepSpeed's Adam for optimizer states in CPU memory, built on first use, even if an earlier build was killed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ...cli.errors import UserError, told
from ...ops.native.build import COMPILING


def cpu_adam(groups: Sequence[dict[str, Any]], **settings: Any) -> Any:
    """A DeepSpeedCPUAdam in its AdamW form over parameter groups; its steps depend on its state alone.

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
        raise UserError(
            f"an offload strategy needs DeepSpeed's Adam for the CPU, which cannot be built here: {told(root(error))}; "
            "it takes a C++ compiler (Debian, Ubuntu: apt install g++), ninja (pip install ninja) and a folder for "
            "torch's extensions that can be written (TORCH_EXTENSIONS_DIR names another); or take a --strategy without "
            "offload"
        ) from error
    optimizer.register_step_pre_hook(forget_powers)
    return optimizer


def forget_powers(optimizer: Any, *_: Any) -> None:
    """Make a DeepSpeedCPUAdam compute the powers of its betas anew in the next step.

    It would multiply the last step's powers by the betas, and a resumed run, which has to compute them, would get other
    bits. An empty update with betas that no run has makes it forget them.
    """
    none = torch.empty(0, dtype=torch.float32)
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 1, 0.0, 1.0, 1.0, 1.0, 0.0, False, none, none, none, none)


def root(error: BaseException) -> BaseException:
    """The first exception of a chain, from which the others were raised."""
    return error if error.__cause__ is None else root(error.__cause__)
