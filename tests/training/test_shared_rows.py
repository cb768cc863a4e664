"""Rows that ranks share have the logits and losses of one process, bit for bit, and its gradients up to rounding."""

import sys

import pytest
import torch

from rwkv_peft.models import FAMILIES
from rwkv_peft.training.step.steps import Whole
from training.runs import ROOT, finish, free_port, start
from training.shared_rows import CASES, Noted, case, found_by

RANKS = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of four ranks found: in two groups of two, and as one of four."""
    file, port = tmp_path_factory.mktemp("shared") / "found", free_port()
    script = str(ROOT / "tests" / "training" / "shared_rows.py")
    ranks = [start([sys.executable, script, str(rank), str(RANKS), port, str(file)]) for rank in range(RANKS)]
    try:
        for process in ranks:
            finish(process, timeout=300)
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(f"{file}-{rank}") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", ["SharedRows", "SharedSegments"])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_ranks_that_share_rows_find_what_one_finds(found, family, parts, step, name):
    model, batch = case(family, name)
    logits, total, gradients = found_by(Whole(Noted()), model, batch)
    group = [rank[family.version, parts, name, step] for rank in found[:parts]]
    if step == "SharedRows":
        shared = torch.cat([part[0] for part in group], 1)[:, : logits.shape[1]]
        if name in (
            "packed",
            "short",
        ):  # kernels count their steps from a document's start; few rows are products of a row
            torch.testing.assert_close(shared, logits, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(shared, logits)
    torch.testing.assert_close(sum(part[1] for part in group), total, rtol=1e-6, atol=0)
    for key, gradient in gradients.items():
        shared = sum(part[2][key] for part in group)
        assert (shared - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, key
