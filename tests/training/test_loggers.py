"""Loggers: a missing login is reported before any work, and the whole config is logged."""

import json
import shutil
import sys
import types

import pytest

from rwkv_peft.cli.errors import UserError
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.saving.loggers import make_loggers

HERE = "rwkv_peft.training.saving.trackers"


@pytest.fixture
def wandb(files, monkeypatch, tmp_path):
    """Parses a command with --wandb on a machine that has the package and no login."""
    monkeypatch.setattr(f"{HERE}.importlib.util.find_spec", lambda name: object())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    where = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--bone_r", "16"]
    return lambda project="mine": parse_run([*where, "--wandb", project])


def test_a_missing_login_is_one_message(wandb):
    with pytest.raises(UserError, match="--wandb mine: this machine is not logged in .* run `wandb login`"):
        wandb()
    with pytest.raises(UserError, match="may not contain"):
        wandb("a/b")


def test_a_login_or_a_run_without_one_is_taken(wandb, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb().config.train.wandb == "mine"
    (tmp_path / ".netrc").unlink()
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert wandb()
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="not logged in"):
        wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb()


def test_the_whole_config_is_logged(files, train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("logged", "--epoch_count", "1", "--epoch_steps", "1")
    text = (files / "logged" / "config.json").read_text()
    assert len(text.splitlines()) > 40 and json.loads(text)["train"]["epoch_count"] == 1
    events = EventAccumulator(str(files / "logged" / "tensorboard"))
    events.Reload()
    logged = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content.decode(errors="replace")
    for name in ("model/n_layer", "adapter/rank", "data/ctx_len", "train/lr_init"):
        assert name in logged


def test_steps_that_a_resumed_run_takes_again_are_shown_once(files, train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    where = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--bone_r", "16"]
    config = parse_run([*where, f"--{tracker}", "mine"]).config
    _, logger = make_loggers(config, files / "tracked", first_step=0)
    logger.log_metrics({"loss": 0.5}, step=3)
    logger.finalize("success")
    settings, *later = heard
    assert settings["project"] == "mine" and settings["config"]["adapter"]["rank"] == 16
    assert "tracked" in settings.values() and later == [(3, {"loss": 0.5}), "finish"]
    module.init = lambda **settings: 1 / 0
    with pytest.raises(UserError, match=f"--{tracker} mine: ZeroDivisionError: division by zero; "):
        make_loggers(config, files / "tracked", first_step=0)


@pytest.mark.parametrize("name, rule", [("a b", "letters, digits"), ("x" * 101, "100 at most")])
def test_a_project_that_swanlab_would_refuse(files, name, rule):
    with pytest.raises(UserError, match=f"--swanlab {name!r}: a project's name has .*{rule}"):
        parse_run(["--load_model", str(files / "base.pth"), "--data_file", str(files / "data"), "--swanlab", name])
