"""Rows that ranks share have the logits and losses of one process, bit for bit, and its gradients up to rounding."""

import sys

import pytest
import torch

from families import DISTINCT
from rwkv_peft.training.step.context_parallel import MOST, in_flight, waiting
from rwkv_peft.training.step.steps import Whole
from training.runs import ROOT, finish, free_port, start
from training.shared_rows import CASES, Noted, case, found_by, near, taught

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
@pytest.mark.parametrize(
    "step, parts", [("SharedRows", 2), ("SharedRows", 4), ("in flight", 2), ("in flight", 4), ("SharedSegments", 4)]
)
@pytest.mark.parametrize("family", DISTINCT, ids=lambda family: family.name)
def test_ranks_that_share_rows_find_what_one_finds(found, family, parts, step, name):
    expected = found_by(Whole(Noted()), *case(family, name))
    group = [rank[family.version, parts, name, step] for rank in found[:parts]]
    agree(group, expected)
    if step != "SharedSegments":
        (logits,) = expected[0]
        shared = torch.cat([torch.cat(parts, 1) for parts in zip(*(rank[0] for rank in group))], 1)
        assert len(group[0][0]) == 1 or step == "in flight" and name != "short"
        logits, shared = (x[:, : min(logits.shape[1], shared.shape[1])] for x in (logits, shared))
        if name in ("packed", "short"):  # kernels count steps from a document's start, and take few tokens otherwise
            torch.testing.assert_close(shared, logits, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(shared, logits)


def test_two_ranks_name_the_messages_of_a_channel_in_one_order(found):
    """NCCL matches what two ranks send and receive by order alone, whichever way it goes."""
    for rank, mine in enumerate(found):
        for other, theirs in enumerate(found):
            for ring in (False, True):
                named = [(sends, size) for by, to, sends, size in mine["messages"] if (by, to) == (ring, other)]
                answered = [(not sends, size) for by, to, sends, size in theirs["messages"] if (by, to) == (ring, rank)]
                assert named == answered, (rank, other, ring)
    assert {by for by, *_ in found[0]["messages"]} == {False, True}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("compute", [taught, near])
def test_a_teacher_and_the_base_read_in_parts_too(found, compute, parts):
    agree([rank[compute.__name__, parts] for rank in found[:parts]], compute(Whole))


def simulated(parts, blocks, segments):
    """The share of a pass that a rank waits, by playing it: a block begins once the rank and the state are there."""
    free, states = [0] * parts, [0] * blocks
    for _ in range(segments):
        for part in range(parts):
            for block in range(blocks):
                free[part] = states[block] = max(free[part], states[block]) + 1
    return 1 - segments * blocks / max(free)


def test_waiting_is_counted_as_ranks_would_wait():
    for parts, blocks, segments in [(1, 5, 1), (2, 24, 1), (8, 32, 5), (4, 4, 3), (8, 3, 1), (8, 3, 6), (64, 32, 8)]:
        assert waiting(parts, blocks, segments) == pytest.approx(simulated(parts, blocks, segments)), parts


def test_as_few_segments_are_in_flight_as_let_ranks_work():
    assert in_flight(2, 32, 1 << 20) == 1 and in_flight(8, 32, 1 << 20) == 5
    assert waiting(8, 32, 5) <= MOST < waiting(8, 32, 4)
    assert in_flight(8, 32, 8 * 512 * 3) == 3 and in_flight(8, 32, 100) == 1  # parts have 512 tokens
    assert waiting(64, 32, in_flight(64, 32, 1 << 20)) < 0.55  # half of them wait in any case


def agree(group, expected):
    """Compare the sums of the losses and of the gradients."""
    torch.testing.assert_close(sum(part[1] for part in group), expected[1], rtol=1e-6, atol=0)
    for key, gradient in expected[2].items():
        shared = sum(part[2][key] for part in group)
        assert (shared - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, key
