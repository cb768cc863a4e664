"""Products by every row of the table, on every processor; halves also on a processor without instructions for them,
which a process of its own is told to be (lowered.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ops.lowered import Watch, distance, gradients
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.models import FAMILIES
from rwkv_peft.ops import products

TESTS = Path(__file__).parents[1]
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
LOWERED = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture(scope="module")
def lowered():
    command = [sys.executable, "-m", "ops.lowered"]
    done = subprocess.run(command, cwd=TESTS, env={**os.environ, **LOWERED}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.processor
def test_a_dtype_that_is_fast_goes_through_torchs_products(dtype):
    a, b, c = (torch.randn(size).to(dtype) for size in ((20, 30), (40, 30), (20, 40)))
    with products.computing(products.NATIVE):
        assert torch.equal(products.linear(a, b, b[:, 0]), F.linear(a, b, b[:, 0]))
        assert torch.equal(products.matmul(a, b.t()), a @ b.t())
        assert torch.equal(products.addmm_(c.clone(), a, b.t(), alpha=0.5), torch.addmm(c, a, b.t(), alpha=0.5))


@needs_onednn
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows, inner, columns", ((50, 70, 30), (1, 70, 30), (70, 1, 30)))
@pytest.mark.processor
def test_onednn_multiplies_float32_forward_and_both_gradients(monkeypatch, dtype, rows, inner, columns):
    """Within the errors of torch's own float32, so that nothing was rounded to bfloat16; and torch multiplies none."""
    monkeypatch.setattr(products, "SMALL", 0)
    torch.manual_seed(0)
    a, b, g, total = (torch.randn(s) for s in ((rows, inner), (columns, inner), (rows, columns), (rows, columns)))
    a, b, g, total = (x.to(dtype) for x in (a, b, g, total))
    A, B, G, T = (x.double() for x in (a, b, g, total))
    trained = [x.clone().requires_grad_() for x in (a, b, b[:, 0])]
    with products.computing(products.ProductRow(False, True)), Watch((dtype, torch.float32)) as watch:
        y = products.linear(*trained)
        found = [
            y,
            *torch.autograd.grad(y, trained, g),
            products.matmul(a[None], b.t())[0],
            products.scaled_product(a, b.t(), 2.0),
        ]
        found.append(products.addmm_(total.clone(), a, b.t(), beta=0.5, alpha=2.0))
        found.append(products.addmm_(total.clone().fill_(torch.nan), a, b.t(), beta=0))
    due = [
        A @ B.t() + B[:, 0],
        G @ B,
        G.t() @ A,
        G.sum(0),
        A @ B.t(),
        2 * A @ B.t(),
        0.5 * T + 2 * A @ B.t(),
        A @ B.t(),
    ]
    assert watch.seen == set()
    for result, exact in zip(found, due, strict=True):
        assert result.dtype == dtype
        bound = torch.finfo(dtype).eps * (exact.abs() + inner + rows)
        assert ((result.double() - exact).abs() <= bound).all()


@needs_onednn
@pytest.mark.processor
def test_products_of_a_few_numbers_and_those_under_autocast_are_torchs():
    a, b = torch.randn(300, 200), torch.randn(400, 200)
    with products.computing(products.ProductRow(True, True)):
        assert torch.equal(products.linear(a[:2], b[:2]), F.linear(a[:2], b[:2]))
        with torch.autocast("cpu", torch.bfloat16):
            assert products.linear(a, b).dtype == torch.bfloat16


@needs_onednn
@pytest.mark.parametrize("method", ("bat-in", "bone", "lora", "none"))
@pytest.mark.processor
def test_onednn_multiplies_all_of_a_step(monkeypatch, method):
    """What torch multiplies of a step in float32 are batches, and products of a few numbers."""
    monkeypatch.setattr(products, "SMALL", 0)
    with products.computing(products.ProductRow(True, True)), Watch((torch.float32,)) as watch:
        found = gradients(FAMILIES[1], method, torch.float32)
    assert watch.seen <= {"aten.bmm.default", "aten.baddbmm.default", "aten.baddbmm_.default"}
    exact = gradients(FAMILIES[1], method, torch.float64)
    assert distance(found, exact) < 1e-5


XEON, AMD = "GenuineIntel", "AuthenticAMD"
UNLIKE = {"machine": "x86_64", "limit": "", "has_avx512": True, "has_bf16": True, "has_amx": False, "arm_bf16": True}
ZEN = products.ZEN


@pytest.mark.parametrize(
    "vendor, family, changes, row",
    [
        (XEON, 6, {"has_amx": True}, products.NATIVE),
        (XEON, 6, {"has_amx": True, "limit": "AVX512_CORE_AMX"}, products.NATIVE),
        (XEON, 6, {"has_amx": True, "limit": "AVX512_CORE_BF16"}, products.CONVERTING),
        (XEON, 6, {"has_amx": True, "limit": "AVX2"}, products.CONVERTING),
        (XEON, 6, {}, products.CONVERTING),
        (AMD, 26, {}, ZEN),
        (AMD, 26, {"limit": "avx512_core_bf16"}, ZEN),
        (AMD, 26, {"limit": "AVX512_CORE"}, products.WITHOUT_BFLOAT16[AMD, 26]),
        (AMD, 26, {"limit": "AVX2"}, products.CONVERTING),
        (AMD, 26, {"limit": "AVX2_VNNI"}, products.CONVERTING),
        (AMD, 26, {"has_avx512": False}, products.CONVERTING),
        (AMD, 25, {}, ZEN),
        (AMD, 25, {"has_bf16": False}, products.CONVERTING),  # Zen 3
        (AMD, 27, {}, products.CONVERTING),
        ("", 0, {}, products.CONVERTING),
        ("", 0, {"machine": "arm64"}, products.NATIVE),
        ("", 0, {"machine": "aarch64", "arm_bf16": False}, products.CONVERTING),
    ],
)
def test_a_table_decides_by_processor_and_by_what_its_libraries_may_use(vendor, family, changes, row):
    assert products.row_of(vendor, family, **UNLIKE | changes) == row


def test_ranks_compute_alike_and_a_run_goes_on_as_it_began():
    (alike, notes), (unlike, words) = (products.agreed(rows, None) for rows in ([ZEN, ZEN], [ZEN, products.NATIVE]))
    assert (alike, notes, unlike) == (ZEN, [], products.CONVERTING) and "rank 1" in words[0]
    assert products.agreed([ZEN], ZEN.recorded()) == (ZEN, [])
    row, (note,) = products.agreed([ZEN], products.CONVERTING.recorded())
    assert row.recorded() == products.CONVERTING.recorded() and "bits may differ" in note
    row, (note,) = products.agreed([products.CONVERTING], ZEN.recorded())  # which would take 40 times as long
    assert row == products.CONVERTING and "bits may differ" in note
    assert products.agreed([ZEN, products.NATIVE], ZEN.recorded())[0] == products.CONVERTING
    assert products.ProductRow.of(ZEN.recorded()).recorded() == ZEN.recorded()
