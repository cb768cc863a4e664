"""The time of a run is that of the steps of an earlier one with the same settings and files, or is not told."""

import json
import os

import pytest

from rwkv_peft.tools.ui.files import Places
from rwkv_peft.tools.ui.runs import LEAST, measured

FLAGS = {"load_model": "base.pth", "data_file": ["rows.jsonl"], "micro_bsz": "8"}


@pytest.fixture
def ask(tmp_path):
    """ask(flags, words, seconds): what is told for `words`, after a run with `flags` whose steps took so long."""
    for name in ("base.pth", "rows.jsonl"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9, 1e9))
    (tmp_path / "out").mkdir()

    def asked(flags, words, seconds=(9.0, *[2.0] * 9), **settings):
        told = {"steps": 10, "train": {"epoch_count": 2}, "flags": FLAGS | flags} | settings
        (tmp_path / "out" / "config.json").write_text(json.dumps(told))
        lines = [{"step": step, "tokens": 100, "tokens_per_s": 100 / one} for step, one in enumerate(seconds)]
        (tmp_path / "out" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        given = "--load_model base.pth --data_file rows.jsonl --micro_bsz 8"
        return measured(Places(tmp_path), f"{given} {words}".split())

    return asked


@pytest.mark.parametrize(
    "flags, words, steps",
    [
        ({}, "", 10),
        ({"lr_init": "1", "proj_dir": "a"}, "--lr_init 2 --proj_dir b --merge_on_save", 10),
        ({"epoch_count": "2"}, "--epoch_count 6", 30),
        ({}, "--epoch_count 6", 30),
        ({"epoch_count": "2"}, "", 0),  # how many epochs are chosen is not known
        ({}, "--ctx_len 99", 0),
        ({"bone_r": "8"}, "", 0),
    ],
)
def test_the_time_is_that_of_the_same_steps(ask, flags, words, steps):
    found = ask(flags, words)
    assert found == (steps and {"seconds": pytest.approx(9 + 2 * (steps - 1)), "steps": steps, "run": "out"} or None)


def test_nothing_is_told_after_too_few_steps_or_of_other_files(ask, tmp_path):
    assert ask({}, "", [1.0] * (LEAST - 1)) is None and ask({}, "", [1.0] * LEAST)
    assert ask({}, "", steps="x") is None and ask({}, "--epoch_count 3", train=[]) is None
    for name in ("base.pth", "rows.jsonl"):
        os.utime(tmp_path / name, (4e9, 4e9))
        assert ask({}, "") is None
        os.utime(tmp_path / name, (1e9, 1e9))
