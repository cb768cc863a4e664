"""A GPU's driver on a CPU, for the programs of scripts/gpu_check.sh: a CPU's tensors take the GPU's code path, and each
launch of a kernel is recorded, runs through the shim, or fails or finds no memory if a test asks for that.

The programs run in forks, so that none imports torch again, and with small sizes.
"""

import functools
import importlib
import json
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from cuda_shim import shim

SMALL = {
    "gpu_smoke": "--device cpu --tokens 24 --rank 16 --repeats 1 --rows packed --methods bat-in",
    "gpu_steps": "--device cpu --shape 64x96x2 --vocab 64 --rank 8 --rows 1x32 --rounds 1",
    "gpu_decode": "--device cpu --shape 64x96x2 --vocab 64 --tokens 3 --sequences 1 2 --rounds 1",
}
ILLEGAL_ADDRESS = 700  # of CUDA's errors


class Driver:
    """Records each launch as a line of the file `log`, and runs it through the shim if `real`, else not at all.

    faults maps a part of a kernel's name to "fail", "out of memory" or "drop" (silently not run)."""

    def __init__(self, log, faults, real):
        self.log, self.faults, self.real = log, faults, real

    def run(self, name, arguments, blocks, block, stream):
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{name} {blocks}\n")
        fault = next((fault for part, fault in self.faults.items() if part in name), "")
        if fault == "out of memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nof nothing")
        if fault == "fail":
            return ILLEGAL_ADDRESS
        return kernels_of(name).run(name, arguments, blocks, block, stream) if self.real and not fault else 0


@functools.cache
def kernels_of(name):
    """The shim's kernels of the family that has a kernel of this name."""
    families = importlib.import_module("gpu_probe").FAMILIES
    return shim.build(next(family for family in families if name in family.names))


@contextmanager
def on_gpu_path(driver, launched):
    """A context in which a CPU's tensors take a GPU's code path, as in gpu_host; `launched` gets the kernels' names."""

    def run(_, name, *launch):
        launched.add(name)
        return driver.run(name, *launch)

    host = importlib.import_module("gpu_host")
    with patch.object(host.Dropped, "run", run), host.gpu_path():
        yield


class Process:
    """Stands in for subprocess.Popen: a fork that runs the command's program of benchmarks/, with small sizes."""

    def __init__(self, command, driver):
        read, write = os.pipe()
        self.command, self.pid = command, os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(write, 1), os.dup2(write, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
            code = 1
            torch.set_num_threads(1)  # those of the parent are not here
            try:
                code = perform(Path(command[1]).stem, list(command[2:]), driver)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(write)
        self.stdout = os.fdopen(read, encoding="utf-8")

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def perform(name, arguments, driver):
    """Run a program -> its exit code."""
    if arguments[:1] in (["card"], ["ready"]):
        print(json.dumps({"emulated": True}))
        return 0
    program, argv = importlib.import_module(name), [*arguments, *SMALL[name].split()]
    if name == "gpu_smoke":  # the truth beside it takes plain torch
        with patch.object(program, "recorded", functools.partial(on_gpu_path, driver)):
            return program.main(argv)
    if name == "gpu_decode":  # which draws of what is computed, and garbage may be NaN
        return program.main(argv)
    with on_gpu_path(driver, set()):
        return program.main(argv)
