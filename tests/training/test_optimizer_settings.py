"""The optimizer's settings when a run resumes: those of the new flags, or a refusal with a message."""

import shutil

import pytest
import torch

from rwkv_peft.files.pth import read_pth
from rwkv_peft.training.saving.checkpoints import find_checkpoint

BOTH = ("--train_parts", "state", "ln", "--state_lr", "2e-2")
HALF = ("--epoch_count", "1")


@pytest.mark.parametrize("stage", ("1", "3"))
def test_a_resumed_run_has_the_settings_of_its_flags(files, train, stage):
    name, flags = f"stage-{stage}", (*BOTH, "--strategy", f"deepspeed_stage_{stage}")
    train(name, *flags, *HALF)
    before = read_pth(files / name / "state.pth")  # replaced, not written over
    shutil.copytree(files / name, files / f"{name}-decayed")
    train(name, *flags, "--resume", "--state_lr", "0")
    after = read_pth(files / name / "state.pth")
    assert after and all(tensor.any() and torch.equal(tensor, before[key]) for key, tensor in after.items())
    settings = ("--beta1", "0.5", "--beta2", "0.75", "--adam_eps", "1e-3")
    train(f"{name}-decayed", *flags, "--resume", *settings)
    state = next((find_checkpoint(files / f"{name}-decayed") / "zero").glob("*optim_states.pt"))
    groups = torch.load(state, weights_only=False)["optimizer_state_dict"]
    groups = groups.get("base_optimizer_state", groups.get("optimizer_state_dict"))["param_groups"]
    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.5, 0.75, 1e-3)}


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--weight_decay", "0.1"), "with --weight_decay 0.1 for 0"),
        (("--state_lr", "1e-2"), "with --state_lr 0.01 for 0.02"),
        (("--lr_init", "2e-2"), "with --lr_init 0.02 for 0.01"),
    ],
)
def test_settings_that_group_parameters_otherwise_are_refused(files, train, flags, words):
    if not (files / "grouped").exists():
        train("grouped", *BOTH, *HALF)
    _, err = train("grouped", *BOTH, "--resume", *flags, code=2)
    assert f"{words}; give the first run's flags, or add --fresh_optimizer" in err and "Traceback" not in err
