"""Kernels on the shim for tests; runs a recurrence's cases there, and on a GPU if there is one."""

import dataclasses

import pytest
import torch

from cuda_shim import cases as wkv6_cases
from cuda_shim import shim, wkv7_cases
from rwkv_peft.ops.mix import cuda as mix_cuda
from rwkv_peft.ops.native.build import BuildError, find_compiler
from rwkv_peft.ops.wkv6 import cuda as wkv6_cuda
from rwkv_peft.ops.wkv7 import cuda as wkv7_cuda

FAMILIES = {"wkv6": (wkv6_cuda, wkv6_cases), "wkv7": (wkv7_cuda, wkv7_cases)}  # a cuda.py and its cases
call_mix = mix_cuda.call  # which a test may replace
DEVICES = ("shim", "gpu") if torch.cuda.is_available() else ("shim",)


def built(family):
    """A CudaFamily's kernels on the CPU, whose threads run in ascending order; skips the test without a compiler."""
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    kernels = shim.build(family)
    kernels.set_order("ascending")
    return kernels


def mix_call(name, like, tensors, **sizes):
    """cuda.call of the mix operations; tensors that a kernel should fill begin as NaN."""
    layout = {**mix_cuda.LAYOUTS, **mix_cuda.TILED}[name]
    for x in (tensors.get(name) for name in (*layout.outputs, *layout.sums)):
        if x is not None:
            x.fill_(float("nan"))
    call_mix(name, like, tensors, **sizes)


def shim_kernels(family):
    """built, of a recurrence."""
    return built(FAMILIES[family][0].FAMILY)


def runner(family, device):
    """A function: a case, and further arguments of the cases' `run` -> the kernels' results on one of DEVICES."""
    module, cases = FAMILIES[family]
    if device == "shim":
        kernels = shim_kernels(family)
        return lambda case, **way: cases.run(kernels, case, **way)
    return lambda case, **way: tuple(x.cpu() for x in cases.run(module.FAMILY.kernels(0), _on_gpu(case), **way))


def _on_gpu(case):
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return type(case)(**{name: None if x is None else x.to("cuda:0") for name, x in fields.items()})
