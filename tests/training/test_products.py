"""A run's files for others: a model that trained whole has its base's keys, order and dtypes; the merged model is
written beside the adapter on request; loggers have the whole config and each step."""

import json
import shutil
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release.merge_command import main as merge
from rwkv_peft.tools.plan.command import estimate_of, parse_flags
from rwkv_peft.training.estimate.memory import written
from rwkv_peft.training.flags.request import parse_flags as parse_train_flags
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.saving.loggers import make_trackers
from training.runs import finish, metrics, start

FULL = ("--peft", "none", "--precision", "fp32", "--micro_bsz", "4", "--lr_init", "1e-4", "--lr_final", "1e-4")


def test_a_model_that_trained_whole_has_the_structure_of_its_base(files, train):
    train("full", *FULL)
    base, model = open_base(files / "base.pth"), open_base(files / "full" / "rwkv.pth")
    structures = [[(k, x.shape, x.dtype) for k, x in each.tensors.items()] for each in (model, base)]
    assert structures[0] == structures[1]
    checkpoint = torch.load(files / "full" / "checkpoints" / "step-00000008" / "rwkv.pth")
    assert list(checkpoint) == list(base.tensors)
    for key, tensor in model.tensors.items():  # the checkpoint's copy is what trained, to the last bit
        assert checkpoint[key].dtype == torch.float32 and torch.equal(checkpoint[key].bfloat16(), tensor)
    train("full", *FULL, "--epoch_count", "3", "--resume", "--save_dtype", "fp32", "--keep_checkpoints", "1")
    left = {str(path.relative_to(files / "full")) for path in (files / "full").rglob("*[0-9].pth")}
    assert left == {"rwkv-epoch-3.pth"}  # and not those that the run had saved before it went on
    assert [path.name for path in (files / "full" / "checkpoints").iterdir()] == ["step-00000012"]
    model = open_base(files / "full" / "rwkv.pth")
    assert {tensor.dtype for tensor in model.tensors.values()} == {torch.float32}
    train("whole", *FULL, "--epoch_count", "3")
    assert [line["loss"] for line in metrics(files, "full")] == [line["loss"] for line in metrics(files, "whole")]


def planned(command, name, *flags):
    """The plan's list of the files of a run on a CPU."""
    return written(estimate_of(parse_flags(command(name, *flags)[2:]), "cpu"))


def test_the_plan_counts_what_lies_there(files, train, command):
    """The number of different files, and the sizes of models in their base's dtype."""
    for name, flags in (("two", ()), ("whole-two", FULL)):
        train(name, *flags)
        trained, checkpoints = planned(command, name, *flags)
        newest = files / name / trained.name.split(",")[0]
        same = list((files / name).rglob(f"{newest.stem}*{newest.suffix}"))
        own = {path.stat().st_ino for path in same if "checkpoints" not in path.parts or path.samefile(newest)}
        assert len(own) == trained.copies == 2
        assert 0 <= newest.stat().st_size - trained.size < 50_000
        assert len(same) == 1 + 2 + 2  # names of those two, some in checkpoints
        files_of_one = [path for path in (files / name / "checkpoints" / "step-00000008").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files_of_one if not path.samefile(newest))
        assert 0 <= size - checkpoints.size < 100_000 and checkpoints.copies == 3


def test_the_merged_model_stands_beside_every_adapter(files, train):
    train("merged", "--merge_on_save", "--save_every", "3")
    folder = files / "merged"
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    assert saved == {"step-00000006", "step-00000008"}  # the newest two of 3, 4, 6 and 8
    argv = ["--base_model", str(files / "base.pth"), "--bone_checkpoint"]
    for name in ("adapter.safetensors", "merged.pth"):
        newest, first, second = (folder / name.replace(".", f"{label}.") for label in ("", "-epoch-1", "-epoch-2"))
        assert newest.samefile(second) and newest.read_bytes() != first.read_bytes()
    for name in ("", "-epoch-1"):
        assert merge([*argv, str(folder / f"adapter{name}.safetensors"), "--output", str(files / "by_hand.pth")]) == 0
        assert (folder / f"merged{name}.pth").read_bytes() == (files / "by_hand.pth").read_bytes()


def test_a_merge_that_cannot_be_written_does_not_end_the_run(files, command):
    still = ("--merge_on_save", "--lr_init", "0", "--lr_final", "0", "--epoch_count", "1")
    _, err = finish(start(command("still", *still)))
    assert "--merge_on_save: " in err and "changes nothing" in err and "Traceback" not in err
    assert not (files / "still" / "merged.pth").exists() and (files / "still" / "adapter.safetensors").exists()


def test_the_whole_config_is_logged(files, train):
    train("logged", "--epoch_count", "1", "--epoch_steps", "1")
    text = (files / "logged" / "config.json").read_text()
    assert len(text.splitlines()) > 40 and json.loads(text)["train"]["epoch_count"] == 1
    events = EventAccumulator(str(files / "logged" / "tensorboard"))
    events.Reload()
    logged = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content.decode(errors="replace")
    for name in ("model/n_layer", "adapter/rank", "data/ctx_len", "train/lr_init"):
        assert name in logged


def test_steps_that_a_resumed_run_takes_again_are_shown_once(files, train):
    flags = ("--save_every", "2", "--epoch_steps", "4", "--precision", "fp32", "--lr_init")
    train("again", *flags, "1e-2", "--epoch_count", "1")
    shutil.rmtree(files / "again" / "checkpoints" / "step-00000004")  # as if killed before it
    train("again", *flags, "1e-3", "--epoch_count", "1", "--resume")
    events = EventAccumulator(str(files / "again" / "tensorboard"))
    events.Reload()
    shown = [(event.step, round(event.value, 6)) for event in events.Scalars("lr")]
    lines = map(json.loads, (files / "again" / "metrics.jsonl").read_text().splitlines())
    assert shown == [(line["step"], round(line["lr"], 6)) for line in lines] and len(shown) == 4


@pytest.mark.parametrize("tracker", ["trackio", "swanlab"])
def test_a_tracker_hears_the_settings_and_each_step(files, monkeypatch, tracker):
    """With a stand-in for its package."""
    heard = []
    module = types.ModuleType(tracker)
    module.__spec__ = object()
    module.init = lambda **settings: heard.append(settings)
    module.log = lambda metrics, step: heard.append((step, metrics))
    module.finish = lambda: heard.append("finish")
    monkeypatch.setitem(sys.modules, tracker, module)
    where = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--bone_r", "16"]
    config = parse_run([*where, f"--{tracker}", "mine"]).config
    _, made = make_trackers(config, files / "tracked", first_step=0)
    made.log({"loss": 0.5}, 3)
    made.close()
    settings, *later = heard
    assert settings["project"] == "mine" and settings["config"]["adapter"]["rank"] == 16
    assert "tracked" in settings.values() and later == [(3, {"loss": 0.5}), "finish"]
    module.init = lambda **settings: 1 / 0
    with pytest.raises(UserError, match=f"--{tracker} mine: ZeroDivisionError: division by zero; "):
        make_trackers(config, files / "tracked", first_step=0)


def test_a_tracker_without_its_package_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--wandb mine needs the wandb package: pip install wandb"):
        parse_train_flags(["--data_file", "x", "--load_model", "y", "--wandb", "mine"])


@pytest.mark.parametrize("system, remedy", [("linux", "install it|activate"), ("darwin", "run it on Linux")])
@pytest.mark.parametrize(
    "flags", ["--devices 2", "--strategy deepspeed_stage_3", "--devices 2 --strategy deepspeed_stage_3"]
)
def test_ranks_and_stage_3_need_deepspeed(monkeypatch, flags, system, remedy):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.platform", system)
    words = ["--data_file", "x", "--load_model", "y"]
    parse_train_flags(words)
    with pytest.raises(
        UserError, match=f"{flags} needs DeepSpeed; ({remedy}).*, or train on one device without {flags}\n"
    ):
        parse_train_flags([*words, *flags.split()])
