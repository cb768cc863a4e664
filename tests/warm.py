"""Runs commands in forks of a process that has already imported torch and the engines, which takes seconds.

Each behaves as `python FILE argument…` does: a process with its own memory, variables, signals and exit code.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

# A run imports these itself; a name that a version lacks is passed over.
IMPORTS = (
    "rwkv_peft.training.run",
    "rwkv_peft.training.engine.callbacks",
    "rwkv_peft.training.engine.data_module",
    "rwkv_peft.training.step.lit",
    "rwkv_peft.training.engine.strategy",
    "lightning.pytorch",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
)
VARIABLES = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}  # are read when those are imported


class Command:
    """A running `python FILE argument…`, with the part of subprocess.Popen's interface that the tests use."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, argv, environment):
        assert argv[0] == sys.executable and environment["OMP_NUM_THREADS"] == VARIABLES["OMP_NUM_THREADS"]
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        self.context.set_forkserver_preload(list(IMPORTS))
        self.process = self.context.Process(target=become, args=(argv[1:], environment, self.outputs))
        before = dict(os.environ)
        os.environ.update(VARIABLES)  # for the process to fork from, which the first command starts
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)

    @property
    def pid(self):
        return self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, number):
        with suppress(ProcessLookupError):  # it may end at any moment
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return tuple(path.read_text() for path in self.outputs)


def become(argv, environment, outputs):
    """Run a Python file as an interpreter with the arguments `argv` would."""
    for path, number in zip(outputs, (1, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which is ignored where the tests run under nohup
    gc.freeze()  # what was imported for all commands is looked through in none
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")
