"""A loss, a gradient or a tensor that is not finite ends a run with a message, and nothing of its step is saved."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rwkv_peft.cli.errors import Diverged
from rwkv_peft.training.saving.checkpoints import DIVERGED
from rwkv_peft.training.saving.saver import gather
from rwkv_peft.training.zero import Zero
from training.runs import metrics


@pytest.mark.parametrize("keep", [True, False])
def test_a_tensor_that_is_not_finite_ends_the_run_on_every_rank(keep):
    engine = SimpleNamespace(rank=0 if keep else 1, whole=lambda tensor: nullcontext())
    with pytest.raises(Diverged, match="w is no longer finite"):
        gather([("w", torch.tensor([1.0, math.inf]))], engine)


def test_a_diverged_run_stops_names_the_step_and_keeps_the_checkpoint(files, train):
    _, err = train(
        *"nan --precision fp32 --lr_init 1e30 --lr_schedule constant --warmup_steps 0".split(),
        *"--gradient_clip_val 0 --epoch_steps 1 --epoch_count 9".split(),
        code=1,
    )
    assert "at step 2;" in err and DIVERGED in err and "step-00000001" in err and "Traceback" not in err
    assert all(torch.isfinite(t).all() for t in load_file(files / "nan" / "adapter.safetensors").values())


def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(files, train):
    """The loss would not show it: lora_B begins at 0, and only its gradient is multiplied by the scale."""
    _, err = train(
        *"infinite --precision fp32 --peft lora --lora_config".split(), '{"lora_r": 4, "lora_alpha": 1e38}', code=1
    )
    assert "gradient norm became inf at step 1" in err and "Traceback" not in err
    assert (
        not (files / "infinite" / "checkpoints").exists() and not (files / "infinite" / "adapter.safetensors").exists()
    )
    assert metrics(files, "infinite") == []


@pytest.mark.parametrize("norm", [math.inf, math.nan, -1.0])  # DeepSpeed's -1 is a norm that it found not finite
def test_a_norm_that_is_not_finite_in_any_spelling(norm):
    engine = SimpleNamespace(step=lambda: None, get_global_grad_norm=lambda: torch.tensor(norm))
    zero = SimpleNamespace(engine=engine, set_rate=lambda rate: None, skipped=False)
    assert not math.isfinite(Zero.step(zero, 1e-3))
