"""Several data sets in one stream: shares of the tokens, an order without state, and what is read of each."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.mixture import Joined, Mixture, shares_of
from rwkv_peft.data.recorded import record_of
from rwkv_peft.data.sources import build_samples, split_samples
from rwkv_peft.data.token_file_writer import TokenFileWriter
from rwkv_peft.data.tokenizer import load_tokenizer
from rwkv_peft.training.flags.request import parse_flags
from rwkv_peft.training.inputs import find_samples

LENGTHS = {"a": (40, 30), "b": (25, 12), "c": (9, 60)}  # documents, and tokens of each


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three token files, whose tokens are 10 to 19, 20 to 29 and 30 to 39; the second has a .mask."""
    folder = tmp_path_factory.mktemp("mixed")
    for number, (name, (documents, size)) in enumerate(LENGTHS.items(), 1):
        with TokenFileWriter(folder / name, vocab_size=80) as writer:
            for _ in range(documents):
                tokens = [10 * number + i % 10 for i in range(size)]
                writer.add(tokens, *([[0, 1] * (size // 2)] if name == "b" else []))
    paths = [str(folder / name) for name in LENGTHS]
    return DataConfig(path=paths[0], more=tuple(paths[1:]), ctx_len=16, dataload="get")


def source_of(sample):
    """The number of the file that a sample is of, by its tokens."""
    tokens = (sample[0] if isinstance(sample, list) else sample)[0]
    return int(tokens[0]) // 10


@pytest.mark.parametrize("dataload", ["get", "pad", "only", "pack"])
@pytest.mark.parametrize("mix", [(), (0.7, 0.2, 0.1), (1, 1, 1), (5, 0.01, 1)])
def test_each_file_has_its_share_of_the_tokens_at_every_place(config, dataload, mix):
    samples = build_samples(replace(config, dataload=dataload, mix=mix, ctx_len=64), 80)
    read, whole = Counter(), 4 * len(samples)
    for n in range(whole):
        read[source_of(samples[n])] += sum(len(mask) for _, mask in rows_of(samples[n]))
    shares = mix or [part.tokens for part in samples.parts]
    total = sum(read.values())
    for number, share in enumerate(shares, 1):
        longest = 64 * 3 / total  # a sample for each source before it, and its own
        assert read[number] / total == pytest.approx(share / sum(shares), abs=longest, rel=0.02)
    seen = samples.seen(whole)
    counts = Counter(source_of(samples[n]) for n in range(whole))
    for number, (name, part) in enumerate(zip(samples.sources, samples.parts), 1):
        assert counts[number] / len(part) == pytest.approx(seen[name], abs=3 / len(part))
    if not mix:
        assert all(times == pytest.approx(4, rel=0.05) for times in seen.values())


@pytest.mark.parametrize("dataload", ["get", "pad", "only", "pack"])
@pytest.mark.parametrize("number, share", [(1, 0.1), (1, 0.5), (2, 0.05)])
def test_replay_has_its_share_between_data_that_keeps_its_epochs(config, dataload, number, share):
    own = replace(config, more=config.more[: number - 1], dataload=dataload, ctx_len=64)
    with_replay = replace(own, replay=config.more[1], replay_share=share)
    alone, samples = build_samples(own, 80), build_samples(with_replay, 80)
    read, places = Counter(), [samples.place(n) for n in range(4 * len(samples))]
    for part, place in places:
        read[part is samples.parts[-1]] += sum(len(mask) for _, mask in rows_of(part[place]))
    assert read[True] / read.total() == pytest.approx(share, abs=64 * 3 / read.total(), rel=0.02)
    for part, alike in zip(samples.parts[:-1], alone.parts):  # in the order without it
        read = [place for found, place in places if found is part]
        assert read == list(range(len(read))) and 4 * len(alike) - number < len(read) <= 4 * (len(alike) + 1)
    train, held_out = split_samples(with_replay, 80, 0.2)
    assert held_out.tokens == split_samples(own, 80, 0.2)[1].tokens
    assert len(train.parts[-1]) == len(samples.parts[-1])


SHAPES = {  # (the tokens of rows, those of them that count, the tokens of a document to replay), each from and to
    "text beside text": ((5, 60), None, (5, 60)),
    "long text beside short answers": ((20, 60), (2, 8), (50, 64)),
    "short text beside long answers": ((10, 64), (9, 63), (3, 12)),
    "rows of every length beside each other": ((2, 64), (1, 64), (2, 64)),
}


@pytest.mark.parametrize("dataload, bucketed", [("pad", True), ("pack", False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_50_steps_replay_a_share_of_the_counted_tokens_to_a_tenth(tmp_path, shape, dataload, bucketed):
    draw, (rows, answers, texts) = Random(1), SHAPES[shape]
    for name, sizes, answered in (("rows", rows, answers), ("old", texts, None)):
        with TokenFileWriter(tmp_path / name, vocab_size=80) as writer:
            for _ in range(700):
                size = draw.randint(*sizes) + 1
                told = min(draw.randint(*answered), size - 1) if answered else size
                writer.add([1] * size, *([[0] * (size - told) + [1] * told] if answered else []))
    path, old = str(tmp_path / "rows"), str(tmp_path / "old")
    samples = build_samples(
        DataConfig(path=path, replay=old, ctx_len=64, dataload=dataload, loss_mask="file", micro_bsz=1 + bucketed), 80
    )
    step = 32  # samples, so that a tenth of what 50 steps replay is more than one
    for begin in (0, 10**6 * step):  # also as a run that goes on
        counts = np.array([(samples.source(n), samples.count(n)) for n in range(begin, begin + 200 * step)])
        learned, replayed = counts[:, 1], counts[:, 1] * counts[:, 0]
        for step_first in range(0, 150 * step, step):
            steps = slice(step_first, step_first + 50 * step)
            assert 0.09 < replayed[steps].sum() / learned[steps].sum() < 0.11


def test_a_sample_depends_on_its_number_alone(config):
    """Whatever was read before: across blocks, epochs and sources, of which one has fewer samples than a block."""
    for dataload in ("pad", "pack"):
        settings = replace(config, loss_mask="file", dataload=dataload, mix=(0.5, 0.3, 0.2))
        samples, numbers = build_samples(settings, 80), [*range(0, 3000, 7), 10**9]
        places = [samples.place(n)[1] for n in numbers]
        for n, place in [*zip(numbers, places)][::-1]:
            again = build_samples(settings, 80) if n % 70 == 0 else samples
            assert again.place(n)[1] == place


def rows_of(sample):
    """The documents of a sample, which may be packed."""
    return sample if isinstance(sample, list) else [sample]


def test_samples_come_in_the_order_of_their_file_and_by_their_number_alone(config):
    samples = build_samples(replace(config, mix=(0.5, 0.3, 0.2)), 80)
    numbers = {id(part): [] for part in samples.parts}
    for n in range(300):
        part, number = samples.place(n)
        numbers[id(part)].append(number)
    assert all(found == list(range(len(found))) for found in numbers.values())
    again = build_samples(replace(config, mix=(0.5, 0.3, 0.2)), 80)
    for n in (299, 0, 123_456_789_012):
        for tensor, same in zip(samples[n], again[n]):
            assert torch.equal(tensor, same)
    for first in range(0, 300, 10):  # in any stretch, each has its share to within a sample or two
        counts = Counter(source_of(samples[n]) for n in range(first, first + 10))
        assert all(abs(counts[number] - 10 * share) <= 2 for number, share in ((1, 0.5), (2, 0.3), (3, 0.2)))


def test_a_mask_belongs_to_its_file(config):
    masked = replace(config, loss_mask="file", dataload="pad")
    samples = build_samples(masked, 80)
    for n in range(60):
        _, mask = samples[n]
        assert bool(mask.all()) == (source_of(samples[n]) != 2)
        assert samples.count(n) == int(mask.sum())


def test_held_out_samples_are_some_of_each_file_and_none_that_trains(config):
    train, held_out = split_samples(replace(config, dataload="pad", mix=(1, 1, 1)), 80, 0.2)
    assert isinstance(train, Mixture) and isinstance(held_out, Joined)
    assert [len(part) for part in held_out.parts] == [8, 5, 2] and len(held_out) == 15
    assert [len(part) for part in train.parts] == [32, 20, 7]
    order = [source_of(held_out[n]) for n in range(15)]
    assert order == [1] * 8 + [2] * 5 + [3] * 2
    for kept, held in zip(train.parts, held_out.parts):
        assert not {kept.unit(n) for n in range(len(kept))} & {held.unit(n) for n in range(len(held))}


def test_shares_are_parts_of_their_sum_as_they_are_written():
    assert shares_of((7, 3)) == shares_of((0.7, 0.3)) == [0.7, 0.3]
    assert shares_of((0.1, 0.2, 0.3)) == shares_of((1.0, 2.0, 3.0)) == [1 / 6, 1 / 3, 0.5]


@pytest.mark.parametrize("dataload", ["pad", "pack"])
def test_a_batch_tells_which_file_each_counted_target_is_of(config, dataload):
    samples = build_samples(replace(config, dataload=dataload, loss_mask="file", mix=(1, 1, 1)), 80)
    batches = TrainBatches(samples, 4, accumulate=2, read_ahead=0)
    for batch in islice(batches, 6):
        targets = batch["targets"].flatten()[batch["counted"]] // 10
        assert torch.equal(batch["of_source"], targets == torch.tensor([[1], [2], [3]]))
    counts = {name: batches.step_count(0) * share for name, share in batches.shares(0).items()}
    read = Counter()
    for n in range(8):
        read["abc"[source_of(samples[n]) - 1]] += samples.count(n)
    assert counts == pytest.approx({name: read[name] for name in "abc"})


def test_several_files_to_validate_on_are_told_apart(config):
    data = DataConfig(path=config.path, ctx_len=16)
    train = parse_flags(["--data_file", "x", "--load_model", "y", "--val_data", *config.more]).train
    assert train == replace(train, val_data=config.more[0], more_val=config.more[1:])
    run = SimpleNamespace(data=data, train=train, model=SimpleNamespace(vocab_size=80))
    samples, measured = find_samples(run)
    assert list(measured["val"].sources) == ["b", "c"]
    assert any(f"validation on 34 samples of {config.more[1]}" in note for note in samples.notes)
    twice = replace(train, more_val=(*config.more[1:], config.more[0]))
    with pytest.raises(UserError, match="--val_data .*b is given twice"):
        find_samples(SimpleNamespace(data=data, train=twice, model=run.model))


def test_files_that_do_not_go_together_are_refused(config, tmp_path):
    with pytest.raises(UserError, match="--data_file .*a is given twice"):
        build_samples(replace(config, more=(config.path,)), 80)
    for name, vocabulary in (("d", "bytes"), ("e", "world")):
        with TokenFileWriter(tmp_path / name, vocab_size=80) as writer:
            writer.add(range(1, 40))
        (tmp_path / f"{name}.json").write_text(record_of(load_tokenizer(vocabulary), []))
    other = replace(config, path=str(tmp_path / "d"), more=(str(tmp_path / "e"),))
    for flag, files in (("--data_file", other), ("--replay", replace(other, more=(), replay=other.more[0]))):
        with pytest.raises(UserError, match=f"{flag} e was made with world .*, and --data_file d with bytes"):
            build_samples(files, 1 << 17)
    with pytest.raises(UserError, match="--replay .*a is the data itself"):
        build_samples(replace(config, replay=config.path), 80)
