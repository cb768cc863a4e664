"""One global cursor: the same optimizer step and gradient for every split of it, exact to resume."""

import subprocess
import sys
import threading
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import DISTINCT
from rwkv_peft.checkpoints.base import base_of
from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches, read_ahead
from rwkv_peft.data.samples import collate
from rwkv_peft.data.sources import build_samples
from rwkv_peft.data.token_file_writer import TokenFileWriter


class Numbered:
    """`size` samples in an epoch; sample n holds n + 1, and each row has its own length."""

    collate = staticmethod(collate)

    def __init__(self, size):
        self.size, self.notes, self.parts = size, ["numbered"], [self]

    def __len__(self):
        return self.size

    def __getitem__(self, n):
        length = 1 + n % 5
        return torch.full((length + 1,), n + 1), torch.arange(length) % 2 == 0

    def count(self, n):
        return (1 + n % 5 + 1) // 2


def rows_of(batch):
    return [int(row[0]) - 1 for row in batch["tokens"]]


def step(samples, micro_bsz, world_size, accumulate, cursor=0):
    """Read one optimizer step on every rank -> its samples, and each micro batch's step_count."""
    rows, counts, counted = [], set(), 0
    for rank in range(world_size):
        batches = TrainBatches(samples, micro_bsz, rank, world_size, accumulate, samples_seen=cursor)
        for batch in islice(batches, accumulate):
            rows += rows_of(batch)
            counts.add(batch["step_count"])
            counted += int(batch["mask"].sum())
    assert counts == {counted}
    return sorted(rows)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_every_split_of_a_step_reads_what_one_process_would(micro_bsz, world_size, accumulate, cursor):
    total = micro_bsz * world_size * accumulate
    assert step(Numbered(7), micro_bsz, world_size, accumulate, cursor) == list(range(cursor, cursor + total))


def test_micro_batches_lie_rank_by_rank():
    batches = TrainBatches(Numbered(100), 2, group=1, groups=3, accumulate=2)
    assert [rows_of(batch) for batch in islice(batches, 4)] == [[2, 3], [8, 9], [14, 15], [20, 21]]


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_resume_goes_on_at_the_next_step(done, micro_bsz, accumulate):
    whole = list(islice(TrainBatches(Numbered(10), micro_bsz, accumulate=accumulate), 12 * accumulate))
    seen = done * micro_bsz * accumulate
    second = TrainBatches(Numbered(10), micro_bsz, accumulate=accumulate, samples_seen=seen)
    for batch, expected in zip(islice(second, (12 - done) * accumulate), whole[done * accumulate :]):
        assert all(torch.equal(batch[name], expected[name]) for name in ("tokens", "targets", "mask"))


def test_resume_with_another_split_goes_on_at_the_next_sample():
    seen = 2 * 3
    ranks = [TrainBatches(Numbered(50), 5, rank, 2, samples_seen=seen) for rank in (0, 1)]
    assert [row for batches in ranks for row in rows_of(next(iter(batches)))] == list(range(6, 16))


def test_few_samples_work_and_say_so():
    batches = TrainBatches(Numbered(3), 4, accumulate=2)
    assert rows_of(next(iter(batches))) == [0, 1, 2, 3]
    assert batches.notes[0] == "numbered" and "8 samples and the data has 3" in batches.notes[1]
    assert TrainBatches(Numbered(8), 4, accumulate=2).notes == ["numbered"]


def test_rows_are_padded_to_the_longest_and_padding_never_counts():
    rows = (([5, 6, 7], [False, True]), ([8, 9], [True]))
    batch = collate([tuple(map(torch.tensor, row)) for row in rows])
    assert batch["tokens"].tolist() == [[5, 6], [8, 0]]
    assert batch["targets"].tolist() == [[6, 7], [9, 0]]
    assert batch["mask"].tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("depth", [0, 3])
def test_reading_ahead_passes_on_items_the_end_and_errors(depth):
    assert list(read_ahead(iter("abc"), depth)) == list("abc")

    def failing():
        yield 1
        raise KeyError("broken")

    iterator = read_ahead(failing(), depth)
    assert next(iterator) == 1
    with pytest.raises(KeyError, match="broken"):
        next(iterator)


def test_a_reader_that_is_left_stops_its_thread():
    before = threading.enumerate()  # any of which may end meanwhile
    iterator = iter(TrainBatches(Numbered(5), 1))
    next(iterator)
    (thread,) = set(threading.enumerate()) - set(before)
    iterator.close()
    assert not thread.is_alive()


def test_a_reader_that_is_forgotten_does_not_hold_up_the_interpreter():
    program = (
        "from itertools import count\nfrom rwkv_peft.data.batches import read_ahead\n"
        "iterator = read_ahead(count(), 2)\nprint(next(iterator))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")


@pytest.fixture
def model(tiny_state):
    state = tiny_state(n_embd=32, vocab_size=40, dim_ffn=48, head_size=8)
    return DISTINCT[0].load(state, base_of(state).config).double()


@pytest.fixture
def data(tmp_path):
    """data(**settings) -> samples over documents of several lengths, some of them masked whole."""
    with TokenFileWriter(tmp_path / "data") as writer:
        for i in range(16):
            tokens = [1 + (7 * i + 3 * j) % 39 for j in range(2 + 5 * i % 11)]
            writer.add(tokens, [int(i % 4 != 1 and j > 1) for j in range(len(tokens))])
    return lambda **settings: build_samples(DataConfig(path=str(tmp_path / "data"), ctx_len=16, **settings), 40)


def gradient(model, batches):
    """The gradient of the step's loss, the counted tokens' mean, summed over micro batches."""
    model.zero_grad()
    for batch in batches:
        logits, _ = model(batch["tokens"], cu_seqlens=batch.get("cu_seqlens"))
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        (losses * batch["mask"].flatten()).sum().div(max(1, batch["step_count"])).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("dataload", ["pad", "get"])
def test_the_gradient_is_the_same_for_every_split_of_a_step(model, data, dataload):
    samples = data(dataload=dataload, loss_mask="file", micro_bsz=2)

    def of(micro_bsz, world_size, accumulate):
        ranks = [
            TrainBatches(samples, micro_bsz, rank, world_size, accumulate, samples_seen=4) for rank in range(world_size)
        ]
        return gradient(model, [batch for batches in ranks for batch in islice(batches, accumulate)])

    whole = of(4, 1, 1)
    assert whole.abs().max() > 0
    for split in ((1, 1, 4), (2, 1, 2), (2, 2, 1), (1, 2, 2), (1, 4, 1)):
        torch.testing.assert_close(of(*split), whole, rtol=1e-9, atol=1e-12)


def test_a_packed_document_is_computed_as_if_alone(model, data):
    samples = data(dataload="pack")
    row = max((samples[n] for n in range(len(samples))), key=len)
    assert len(row) >= 3
    batch = collate([row])
    packed, _ = model(batch["tokens"], cu_seqlens=batch["cu_seqlens"])
    alone = [model(tokens[None, :-1])[0] for tokens, _ in row]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-9)


def test_packing_and_padding_learn_the_same_from_the_same_documents(model, data):
    epochs = (data(dataload=dataload, loss_mask="file") for dataload in ("pack", "pad"))
    packed, padded = (gradient(model, islice(TrainBatches(samples, len(samples)), 1)) for samples in epochs)
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-12)
