"""DeepSpeed's Adam for optimizer states in CPU memory, built on first use, whatever an earlier build left behind.

torch guards the build by a file that exists while one goes on. A build that was killed leaves that file, and each later
one waits for it without a word and without an end; here it counts only while some process has it open.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock

from ..errors import UserError, told


def cpu_adam(groups: Sequence[dict[str, Any]], **settings: Any) -> Any:
    """DeepSpeedCPUAdam in its AdamW form over parameter groups, whose steps depend on its state alone. The first on a
    machine compiles it, for a minute or so; other processes of this package wait meanwhile. Raises UserError where that
    is not possible."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    try:
        build = Path(_get_build_directory(CPUAdamBuilder().name, verbose=False))
        with FileLock(build / "rwkv_peft.lock"):  # which ends with its process
            remove_stale_lock(build / "lock")
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
    """Have a DeepSpeedCPUAdam compute the powers of its betas in the step that follows. From a step to the next it
    multiplies them up, which a resumed run cannot go on with: the first step behind a checkpoint computes them, to
    other bits. Betas that are no run's make it begin anew."""
    none = torch.empty(0, dtype=torch.float32)
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 1, 0.0, 1.0, 1.0, 1.0, 0.0, False, none, none, none, none)


def root(error: BaseException) -> BaseException:
    """The exception that the others of its chain were raised from."""
    return error if error.__cause__ is None else root(error.__cause__)


def remove_stale_lock(lock: Path) -> None:
    """Remove torch's build lock, a path, unless a process has it open."""
    if lock.exists() and not any(_has_open(process, lock) for process in psutil.process_iter()):
        lock.unlink(missing_ok=True)


def _has_open(process: psutil.Process, path: Path) -> bool:
    try:
        return any(Path(file.path) == path.resolve() for file in process.open_files())
    except (psutil.AccessDenied, psutil.NoSuchProcess):  # another user's, who cannot write in this folder; or ended
        return False
