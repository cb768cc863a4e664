"""A run's folder: one run at a time writes there, and nothing of an earlier run is lost."""

import os

import pytest

from rwkv_peft.checkpoints.lock import alone_in
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import TrainConfig
from rwkv_peft.training.flags.request import parse_flags
from rwkv_peft.training.saving.checkpoints import UNSAVED, clear_unsaved
from rwkv_peft.training.saving.resume import find_state
from training.command_lines import flags, refused, small_files

files = small_files


def test_a_folder_that_cannot_be_written_is_told_before_any_work(files, monkeypatch, capsys):
    (files / "file").touch()
    below = flags(files, "--proj_dir", str(files / "file" / "out"))
    assert "a file stands where" in refused(monkeypatch, capsys, below)


@pytest.mark.parametrize("leftover", ["adapter.safetensors", "adapter-best.safetensors"])
def test_what_a_new_run_would_overwrite_is_named_with_or_without_resume(files, monkeypatch, capsys, leftover):
    (files / "out").mkdir()
    for name in ("metrics.jsonl", leftover):
        (files / "out" / name).touch()
    fresh, resumed = (refused(monkeypatch, capsys, flags(files, *more)) for more in ([], ["--resume"]))
    assert f"already holds {leftover}" in fresh and "add --resume" not in fresh
    assert f"{leftover} away and leave --resume out" in resumed


@pytest.mark.parametrize(
    "flag, name",
    [
        ("--load_model", "merged.pth"),
        ("--load_model", "rwkv-best.pth"),
        ("--state_load", "state.pth"),
        ("--adapter", "adapter-epoch-2.safetensors"),
        ("--eval_data", "answers.jsonl"),
    ],
)
@pytest.mark.parametrize("linked", [None, "name", "source"])
def test_what_a_run_reads_is_not_written_over(files, monkeypatch, capsys, flag, name, linked):
    (files / "out").mkdir()
    source, place = files / "source.pth", files / "out" / name
    (source if linked == "name" else place).write_bytes((files / "base.pth").read_bytes())
    if linked:
        (place if linked == "name" else source).symlink_to(source if linked == "name" else place)
    given = source if linked else place
    more = ("--train_parts", "state") if flag == "--state_load" else ()
    told = refused(monkeypatch, capsys, flags(files, *more, flag, str(given)))
    assert (
        f"{given} is to be read, and --proj_dir {files / 'out'} is where this run writes its own {name}; move" in told
    )
    parse_flags(flags(files, *more, flag, str(given), "--proj_dir", str(files / "other")))


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(tmp_path, resume):
    train, identity = TrainConfig(resume=resume), {"adapter": {"method": "bone"}}
    (tmp_path / "metrics.jsonl").touch()
    assert find_state(tmp_path, train, identity) == (None, None)
    (tmp_path / "adapter-epoch-1.safetensors").touch()
    with pytest.raises(UserError, match="already holds adapter-epoch-1|move .*adapter-epoch-1"):
        find_state(tmp_path, train, identity)


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_folder_has_one_run_at_a_time(files, monkeypatch, capsys, more):
    with alone_in(files / "out"):
        told = refused(monkeypatch, capsys, flags(files, *more), 75)
    assert f"a run is training there (process {os.getpid()} on " in told
    assert not (files / "out").exists()


def test_what_a_run_left_that_died_before_its_first_checkpoint_is_cleared(tmp_path):
    kinds = {"adapter": "safetensors", "rwkv": "pth", "merged": "pth", "state": "pth"}
    left = [f"{kind}{label}.{end}" for kind, end in kinds.items() for label in ("", "-best", "-epoch-2")]
    others = ["my-adapter.safetensors", "state-of-mine.pth", "adapter.txt", "metrics.jsonl"]
    for name in (*left, *others):
        (tmp_path / name).touch()
    clear_unsaved(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(left) + len(others)  # a run that has saved
    (tmp_path / UNSAVED).touch()
    clear_unsaved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, UNSAVED}
