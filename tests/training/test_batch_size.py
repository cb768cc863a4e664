"""--micro_bsz of a run without it on a GPU, by the memory and the data, with the rate for it. The CPU stands for the
card."""

import json
import math

import pytest

from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli import commands
from rwkv_peft.training import run
from rwkv_peft.training.batch_size import ROWS, SHARE
from rwkv_peft.training.estimate.memory import GPU, Estimate, peak
from rwkv_peft.training.ranks import group
from rwkv_peft.training.ranks.world import World

GIB = 1 << 30
steps = run.train_to_the_end
MANY = 8 * 400  # rows of which 8 at a time are the steps that few rows are read for


@pytest.fixture
def train(tmp_path, tiny_state, monkeypatch, capsys):
    """train(rows, memory, *flags) -> (header, its TrainingRun), without the steps."""
    save_model(tmp_path / "base.pth", tiny_state(vocab_size=257))
    prepared = []
    monkeypatch.setattr(run, "train_to_the_end", lambda ready, say: prepared.append(ready) or (0, ""))

    def run_it(rows, memory, *flags):
        monkeypatch.setattr(run, "gpu_memory", lambda device: memory)
        lines = (json.dumps({"query": f"{n} birds?", "response": f"{n}!"}) for n in range(rows))
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        words = ["--load_model", tmp_path / "base.pth", "--data_file", tmp_path / "rows.jsonl", "--data_type", "sft"]
        words += ["--tokenizer", "bytes", "--proj_dir", tmp_path / "out", "--bone_r", 16, "--ctx_len", 64]
        assert commands.main([str(word) for word in ["train", *words, "--accelerator", "cpu", *flags]]) == 0
        return capsys.readouterr().out, prepared[-1]

    return run_it


@pytest.mark.parametrize(
    "rows, flags, chosen, reason",
    [
        (MANY, (), 8, "8 are enough"),
        (MANY - 8, (), 4, f"with more, {MANY - 8:,} samples would make less than 400 steps"),
        (100, (), 1, "with more, 100 samples would make less than 400 steps"),
        (100, ("--epoch_count", "8"), 2, "less than 400 steps"),
        (MANY, ("--accumulate_grad_batches", "4"), 2, "less than 400 steps"),
        (MANY, ("--dataload", "only"), 1, "other flags admit no more"),
    ],
)
def test_rows_are_chosen_by_the_data(train, rows, flags, chosen, reason):
    header, ready = train(rows, 24 * GIB, *flags)
    assert f"--micro_bsz {chosen} is chosen, for this GPU: " in header and reason in header
    data, plan = ready.config.data, ready.plan
    assert data.micro_bsz == chosen and plan.step_samples == ready.config.step_samples
    assert plan.total_steps >= 400 or chosen == 1
    assert all(part.bucketed == (chosen > 1) for part in ready.samples.parts if hasattr(part, "bucketed"))


def test_rows_fit_in_a_share_of_the_card(train):
    _, ready = train(MANY, 24 * GIB)
    need = {rows: peak(Estimate(ready.config, GPU).parts(rows=rows), GPU) for rows in (2, 4)}
    header, ready = train(MANY, int(need[2] / SHARE) + 1)
    assert ready.config.data.micro_bsz == 2 and need[4] > need[2]
    assert f"more would take over 75% of the card's {need[2] / SHARE / GIB:.0f} GiB at --ctx_len 64" in header


def test_the_rate_follows_the_rows_and_a_given_one_stays(train):
    _, alone = train(100, 24 * GIB)
    header, ready = train(MANY, 24 * GIB)
    expected = alone.config.train.lr_init * math.sqrt(ROWS)
    assert ready.config.train.lr_init == pytest.approx(expected, rel=0.05) and "times the root of 8 rows" in header
    assert ready.config.train.lr_final == pytest.approx(expected / 10, rel=0.05)
    header, ready = train(MANY, 24 * GIB, "--lr_init", "1e-3")
    assert ready.config.train.lr_init == 1e-3 and "root of" not in header


def test_on_a_cpu_and_with_steps_that_are_given_nothing_is_chosen(train):
    for memory, flags in ((0, ()), (24 * GIB, ("--epoch_steps", "5"))):
        header, ready = train(MANY, memory, *flags)
        assert ready.config.data.micro_bsz == 1 and "--micro_bsz" not in header


def test_a_given_number_stays_and_a_small_one_is_told(train):
    header, ready = train(MANY, 24 * GIB, "--micro_bsz", "2")
    words = "note: --micro_bsz 2 leaves a GPU waiting between kernels; 8 would suit this run"
    assert words in header and ready.config.data.micro_bsz == 2
    assert "leaves a GPU waiting" not in train(MANY, 24 * GIB, "--micro_bsz", "8")[0]


def test_a_run_goes_on_with_the_rows_that_it_began_with(train, tmp_path, monkeypatch):
    taken = run.__dict__["train_to_the_end"]
    monkeypatch.setattr(run, "train_to_the_end", lambda ready, say: (taken(ready, say), steps(ready, say))[1])
    train(20, 0, "--micro_bsz", "4", "--epoch_count", "1")
    header, ready = train(20, 24 * GIB, "--epoch_count", "2", "--resume")
    assert ready.config.data.micro_bsz == 4 and "is chosen, for this GPU" not in header
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["samples"] for record in records] == list(range(4, 44, 4))


def test_ranks_take_the_smallest_card(monkeypatch):
    monkeypatch.setattr(group, "gathered", lambda value: [value, 8 * GIB])
    ranks = group.Ranks.__new__(group.Ranks)
    ranks.world = World(1, 2)
    assert ranks.least(24 * GIB) == 8 * GIB
