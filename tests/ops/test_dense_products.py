"""Products of halves on a processor without instructions for them, which a process of its own is told to be
(lowered.py), and on this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.models import FAMILIES
from rwkv_peft.ops import products

TESTS = Path(__file__).parents[1]
LOWERED = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture(scope="module")
def lowered():
    command = [sys.executable, "-m", "ops.lowered"]
    done = subprocess.run(command, cwd=TESTS, env={**os.environ, **LOWERED}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    if not all(told["slow"]):
        pytest.skip("this processor multiplies halves fast whatever it is told")
    return told


def test_no_product_of_a_step_is_torchs_own_of_halves(lowered):
    assert len(lowered["steps"]) == len(products.HALVES) * (len(FAMILIES) + len(METHODS))
    assert {case: seen for case, seen, *_ in [*lowered["steps"], *lowered["others"]] if seen} == {}


def test_a_step_loses_no_more_than_with_torchs_products_of_halves(lowered):
    further = {case: (found, plain) for case, _, found, plain in lowered["steps"] if not found < 1.1 * plain}
    assert further == {}


def test_a_product_is_rounded_once_however_it_is_cut(lowered):
    assert {case: roundings for case, roundings in lowered["matrices"] if roundings > 1.01} == {}


def test_no_converted_tensor_is_kept(lowered):
    assert lowered["kept"] == ["torch.bfloat16"]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, *products.HALVES))
def test_a_dtype_that_is_fast_here_goes_through_torchs_products(dtype):
    if products.is_slow(dtype):
        pytest.skip(f"this processor multiplies {dtype} slowly")
    a, b, c = (torch.randn(size).to(dtype) for size in ((20, 30), (40, 30), (20, 40)))
    assert torch.equal(products.linear(a, b, b[:, 0]), F.linear(a, b, b[:, 0]))
    assert torch.equal(products.matmul(a, b.t()), a @ b.t())
    assert torch.equal(products.addmm_(c.clone(), a, b.t(), alpha=0.5), torch.addmm(c, a, b.t(), alpha=0.5))
