"""The mix operations' CUDA kernels on the CPU, through tests/cuda_shim."""

import pytest

from cuda_shim import running
from rwkv_peft.ops.mix import cpu, cuda, shift


@pytest.fixture
def on_shim(monkeypatch):
    """Send the operations' CPU tensors through the CUDA kernels; tensors that these should fill begin as NaN."""
    kernels = running.built(cuda.FAMILY)
    monkeypatch.setattr(cuda.FAMILY, "kernels", lambda device: kernels)
    monkeypatch.setattr(cpu, "call", running.mix_call)
    monkeypatch.setattr(shift, "CpuLerp", shift.GpuLerp)
    return kernels
