"""The mix operations' CUDA kernels on the CPU, through tests/cuda_shim."""

import pytest

from cuda_shim import running
from rwkv_peft.ops.mix import cpu, cuda, gpu_lerp, op


@pytest.fixture(scope="session")
def kernels():
    return running.built(cuda.FAMILY)


@pytest.fixture(autouse=True)
def on_shim(request, monkeypatch):
    """Send the operations' CPU tensors through the CUDA kernels."""
    if "kernels" not in request.fixturenames:
        return
    kernels = request.getfixturevalue("kernels")
    kernels.set_order("ascending")

    def call(name, like, tensors, **sizes):
        """Tensors that a kernel should fill begin as NaN."""
        layout = {**cuda.LAYOUTS, **cuda.TILED}[name]
        for x in (tensors.get(name) for name in (*layout.outputs, *layout.sums)):
            if x is not None:
                x.fill_(float("nan"))
        cuda.call(name, like, tensors, **sizes)

    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: kernels)
    monkeypatch.setattr(cpu, "call", call)
    monkeypatch.setattr(op, "cpu_lerp", gpu_lerp)
