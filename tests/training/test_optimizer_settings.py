"""The optimizer's settings when a run resumes: those of the new flags."""

import shutil

import pytest
import torch

from rwkv_peft.checkpoints.tensors import read_pth
from rwkv_peft.training.saving.checkpoints import find_checkpoint
from rwkv_peft.training.saving.optimizer_state import SavedOptimizer

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
    train(f"{name}-decayed", *flags, "--resume", *"--beta1 0 --beta2 0 --weight_decay 0.1 --state_lr 1e-2".split())
    found = SavedOptimizer(find_checkpoint(files / f"{name}-decayed")).found  # other groups than before, too
    moments = [
        (parts, found["exp_avg_sq", parameter]) for (kind, parameter), parts in found.items() if kind == "exp_avg"
    ]
    assert moments
    for first, second in moments:  # without memory, both are of the last gradient
        for (_, mean), (_, square) in zip(first, second, strict=True):
            torch.testing.assert_close(mean**2, square)
