"""The CUDA kernels' source, run on the CPU through tests/cuda_shim, against the float64 reference; and what nvcc says
of it."""

import dataclasses
import re
import subprocess

import pytest
import torch
from cuda_shim import cases, shim

from rwkv_peft.ops import cuda
from rwkv_peft.ops.build import BuildError, source_directory

LENGTHS = (1, 2, 15, 16, 17, 64, 100, 257)
HEAD_SIZES = (8, 32, 64, 128)


@pytest.fixture(scope="module")
def kernels():
    try:
        built = shim.build()
    except BuildError as error:
        pytest.skip(str(error))
    built.set_order("ascending")
    return built


def check(kernels, case, roundings=32 * torch.finfo(torch.float32).eps):
    """Every result is within twice plain torch's error in the same precision, plus `roundings` of its scale.

    Where the true gw is near zero its scale is that of k gk, of which it is a difference.
    """
    true, plain, ours = (dict(zip(cases.RESULTS, f(case))) for f in (cases.truth, cases.plain, ours_on(kernels)))
    assert ours.keys() == true.keys()
    for name, x in ours.items():
        assert x.shape == true[name].shape
        scale = cases.rms(true[name]) + (cases.rms(case.k * true["gk"]) if name == "gw" else 0.0)
        bound = 2 * cases.error(plain[name], true[name]) + roundings * scale
        error = cases.error(x, true[name])
        assert error <= bound, f"{name}: error {error:.2e}, bound {bound:.2e}"


def ours_on(kernels):
    return lambda case: cases.run(kernels, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("N", HEAD_SIZES)
@pytest.mark.parametrize("T", LENGTHS)
def test_results_and_gradients_match_the_reference(kernels, T, N, dtype):
    B, H = 1 + T % 3, 1 + (T + N // 8) % 2
    check(kernels, cases.make_case(B, T, H, N, dtype, with_state=T % 2 == 1 or T == 64, seed=T + N))
