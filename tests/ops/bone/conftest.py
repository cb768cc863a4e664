"""Bone's CUDA kernels on the CPU, through tests/cuda_shim."""

import pytest

from cuda_shim import running
from rwkv_peft.ops.bone import cuda, op


@pytest.fixture(scope="session")
def built():
    return running.built(cuda.FAMILY)


@pytest.fixture
def launched():
    """The names of the kernels that `kernels` ran."""
    return []


@pytest.fixture
def kernels(built, launched, monkeypatch):
    """Send CPU tensors through the CUDA kernels; tensors that they should fill begin as NaN."""
    built.set_order("ascending")
    run = cuda.call

    def call(name, like, given, blocks, **sizes):
        launched.append(name)
        for key in ("z", "shift", "parts", "total", "tiled"):
            if given.get(key) is not None and not (key == "parts" and name.startswith("sum_parts")):
                given[key].fill_(float("nan"))
        run(name, like, given, blocks, **sizes)

    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: built)
    monkeypatch.setattr(cuda, "call", call)
    monkeypatch.setattr(op, "backend", lambda first, *others, rank=0: cuda if first.dtype in cuda.DTYPES else None)
    return built
