"""Rows that ranks share have the logits and losses of one process, bit for bit, and its gradients up to rounding."""

import sys

import pytest
import torch

from families import DISTINCT
from rwkv_peft.training.step.steps import Whole
from training.runs import ROOT, finish, free_port, start
from training.shared_rows import CASES, Noted, case, found_by, taught

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
@pytest.mark.parametrize("step, parts", [("SharedRows", 2), ("SharedRows", 4), ("SharedSegments", 4)])
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_ranks_that_share_rows_find_what_one_finds(found, family, parts, step, name):
    expected = found_by(Whole(Noted()), *case(family, name))
    group = [rank[family.version, parts, name, step] for rank in found[:parts]]
    agree(group, expected)
    if step == "SharedRows":
        logits, shared = expected[0], torch.cat([part[0] for part in group], 1)[:, : expected[0].shape[1]]
        if name in ("packed", "short"):  # kernels count steps from a document's start, and take few tokens otherwise
            torch.testing.assert_close(shared, logits, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(shared, logits)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_teacher_reads_in_parts_too(found, parts):
    agree([rank["taught", parts] for rank in found[:parts]], taught(Whole))


def agree(group, expected):
    """Compare the sums of the losses and of the gradients."""
    torch.testing.assert_close(sum(part[1] for part in group), expected[1], rtol=1e-6, atol=0)
    for key, gradient in expected[2].items():
        shared = sum(part[2][key] for part in group)
        assert (shared - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, key
