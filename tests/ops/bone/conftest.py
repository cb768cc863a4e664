"""Bone's CUDA kernels on the CPU, through tests/cuda_shim."""

import pytest

from cuda_shim import shim
from rwkv_peft.ops.bone import cuda, op
from rwkv_peft.ops.native.library import BuildError


@pytest.fixture(scope="session")
def built():
    try:
        return shim.build(cuda.FAMILY)
    except BuildError as error:
        pytest.skip(str(error))


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
            if given.get(key) is not None and (key, name) != ("parts", "sum_parts"):
                given[key].fill_(float("nan"))
        run(name, like, given, blocks, built, **sizes)

    monkeypatch.setattr(cuda, "call", call)
    monkeypatch.setattr(op, "backend", lambda first, *others, rank=0: cuda if first.dtype in cuda.DTYPES else None)
    return built
