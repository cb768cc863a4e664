"""DeepSpeed's Adam for optimizer states in CPU memory, built on first use, even if an earlier build was killed.

torch's lock for the build is a file that exists meanwhile. A killed build leaves it, and every later build would wait
for it silently and forever; here the lock counts only while a process has it open.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import psutil
import torch
from filelock import FileLock

from ...children import python_command, when_parent_ends
from ...cli.errors import UserError, told
from ...ops.native.build import COMPILING


def cpu_adam(groups: Sequence[dict[str, Any]], **settings: Any) -> Any:
    """Make a DeepSpeedCPUAdam in its AdamW form over parameter groups; its steps depend on its state alone. The first
    on a machine compiles it, in a minute or so, while other processes of this package wait. Raises UserError if that is
    not possible."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    try:
        name = CPUAdamBuilder().name
        build = Path(_get_build_directory(name, verbose=False))
        if not (build / f"{name}.so").exists():
            COMPILING.info("compiling DeepSpeed's Adam for the CPU, a minute or so, once for this machine")
        with FileLock(build / "rwkv_peft.lock"):  # freed when its process ends
            remove_stale_lock(build / "lock")
            if not (build / f"{name}.so").exists():
                build_apart()
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


def build_apart() -> None:
    """Build DeepSpeed's Adam in a process that ends with this one, and with it the compilers, which would go on for
    minutes after a kill. If that fails, the build in this process raises the reason."""
    command = python_command("rwkv_peft.training.optimizers.cpu_adam")
    with subprocess.Popen(command, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL) as build:
        build.wait()


def main() -> None:
    """Build DeepSpeed's Adam in this process."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    when_parent_ends(end_all)
    CPUAdamBuilder().load()


def end_all() -> None:
    """End the processes that this one started, each of which ninja puts into a group of its own, and this one."""
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


def forget_powers(optimizer: Any, *_: Any) -> None:
    """Make a DeepSpeedCPUAdam compute the powers of its betas anew in the next step. It would multiply those of the
    last step by the betas, and a resumed run, which has to compute them, would get other bits. An empty update with
    betas that no run has makes it forget them."""
    none = torch.empty(0, dtype=torch.float32)
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 1, 0.0, 1.0, 1.0, 1.0, 0.0, False, none, none, none, none)


def root(error: BaseException) -> BaseException:
    """The first exception of a chain, from which the others were raised."""
    return error if error.__cause__ is None else root(error.__cause__)


def remove_stale_lock(lock: Path) -> None:
    """Remove torch's build lock, a path, unless a process has it open."""
    if lock.exists() and not any(_has_open(process, lock) for process in psutil.process_iter()):
        lock.unlink(missing_ok=True)


def _has_open(process: psutil.Process, path: Path) -> bool:
    try:
        return any(Path(file.path) == path.resolve() for file in process.open_files())
    except (psutil.AccessDenied, psutil.NoSuchProcess):  # another user's, who cannot write here; or it ended
        return False


if __name__ == "__main__":
    main()
