"""--compile: compile the blocks of a model with torch.compile for the time of a run.

All blocks share their code. torch compiles the same code at most 8 times (its recompile_limit) before it runs it
uncompiled. The first block, those between and the last need one time each. To need no more, shapes are dynamic from the
start if batches differ in them. Passes outside of training run uncompiled. infctx and objectives that run base and
adapter in turn still need more than 8: the limit is raised for the time of the run.
"""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from ...cli.errors import UserError
from ...cli.installing import COMPILER
from ...cli.names import user_cache
from ...config import DataConfig
from ...models.parts import LanguageModel

RECOMPILE_LIMIT = 64  # the raised limit
COMPILERS = ("g++", "clang++", "c++")


def require_compiler() -> None:
    """Raise UserError if this machine lacks a C++ compiler or Python's headers: torch.compile builds with them."""
    named = [os.environ[name] for name in ("CXX", "CC") if os.environ.get(name)]
    if not any(map(shutil.which, named or COMPILERS)):
        raise UserError(
            f"--compile needs a C++ compiler, and {', '.join(named or COMPILERS)} cannot be run here; install one "
            f"({COMPILER}), or leave --compile out"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        raise UserError(
            f"--compile needs Python's headers, and {header} does not exist; install them (Debian, Ubuntu: apt install "
            "python3-dev), or leave --compile out"
        )


@contextmanager
def compiled(model: LanguageModel, data: DataConfig) -> Iterator[None]:
    """Within, compile the blocks of a model as batches first reach them; shapes are dynamic if batches differ."""
    if (cache := user_cache()) is not None:  # torch's own place is in /tmp, where any user may put libraries before
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    varies = data.dataload != "get" or data.documents > 1  # lengths, and numbers of packed sequences
    for block in model.blocks:
        block.compile(dynamic=varies or None)
    # dynamic would make an adapter's numbers symbolic too, which no autograd Function takes; cache_size_limit is torch
    # 2.6's name of recompile_limit
    with torch._dynamo.config.patch(specialize_float=True, cache_size_limit=RECOMPILE_LIMIT):
        yield


def uncompiled(compile: bool) -> AbstractContextManager[object]:
    """Within, run blocks uncompiled. Passes without gradients have many shapes; each would be compiled."""
    return torch.compiler.set_stance("force_eager") if compile else nullcontext()
