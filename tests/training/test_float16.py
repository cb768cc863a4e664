"""--precision fp16: small gradients survive the head, steps that overflow are skipped, and a run goes on with its loss
scale."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rwkv_peft.checkpoints.tensors import read_safetensors, save_safetensors
from rwkv_peft.objectives.cross_entropy import linear_cross_entropy
from rwkv_peft.objectives.divergence import Divergence, linear_divergence
from rwkv_peft.training.saving.checkpoints import STATE, read_state, record_of, write_state
from rwkv_peft.training.saving.optimizer_state import METADATA_KEY, SCALE, SavedOptimizer
from training.runs import metrics, rewound

FLAGS = "--precision fp16 --train_parts ln time --lr_schedule constant".split()
COUNT, LOSS_SCALE = 2.0**20, 2.0**16


@pytest.mark.parametrize("taught", (False, True))
def test_the_gradient_of_a_step_of_many_tokens_does_not_vanish(taught):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, known = (torch.randn(size, generator=generator) for size in ((1, 20, 16), (50, 16), (20, 16)))
    targets, counted = torch.randint(50, (1, 20), generator=generator), torch.arange(20)

    def gradient(dtype):
        x, head = hidden.to(dtype).requires_grad_(), weight.to(dtype)
        if taught:
            teacher = known.to(dtype), head
            loss = linear_divergence((x, head), teacher, targets, counted, COUNT, Divergence("forward", 0.5, 1.0, 0.5))[
                0
            ]
        else:
            loss = linear_cross_entropy(x, head, targets, counted, COUNT)
        (loss * LOSS_SCALE).backward()
        return loss.detach(), x.grad.double() / LOSS_SCALE

    (loss, found), (exact, due) = gradient(torch.float16), gradient(torch.float64)
    torch.testing.assert_close(loss.double(), exact.double(), rtol=1e-2, atol=0)
    assert (found - due).norm() / due.norm() < 5e-3


def with_scale(checkpoint, scale):
    """Set the loss scale in a checkpoint, from which the next overflow halves it."""
    path = checkpoint / "optimizer" / "rank-00000.safetensors"
    tensors, header = read_safetensors(path)
    tensors, told = {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(header[METADATA_KEY])
    told[SCALE] |= {"cur_scale": scale, "cur_hysteresis": 1}
    save_safetensors(path, tensors, header | {METADATA_KEY: json.dumps(told)})
    state = read_state(checkpoint)
    state["files"]["optimizer/rank-00000.safetensors"] = record_of(path)
    write_state(checkpoint / STATE, state)


def test_a_run_goes_on_with_its_loss_scale_and_skips_steps_that_overflow(files, train):
    train("whole", *FLAGS)
    for name in ("parts", "high"):
        rewound(files / "whole", name)
    train("parts", *FLAGS, "--resume")
    whole, parts = ((files / name / "adapter.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts and load_file(files / "whole" / "adapter.safetensors").popitem()[1].dtype == torch.float16
    assert [line["loss_scale"] for line in metrics(files, "whole")] == [2.0**16] * 8

    checkpoint = files / "high" / "checkpoints" / "step-00000004"
    with_scale(checkpoint, 2.0**21)
    told, _ = train("high", *FLAGS, "--resume")
    lines = metrics(files, "high")[4:]
    assert "step skipped: loss scale" in told
    skips = [line["skipped"] for line in lines]
    assert skips[0] == 1 and lines[0]["grad_norm"] is None and lines[0]["loss_scale"] == 2.0**20
    assert [line["loss_scale"] for line in lines] == [2.0 ** (21 - sum(skips[: n + 1])) for n in range(4)]
    assert lines[0]["loss"] == metrics(files, "whole")[4]["loss"]
    saved = SavedOptimizer(files / "high" / "checkpoints" / "step-00000008")
    assert saved.steps == 8 - sum(skips) and saved.scale["cur_scale"] == lines[-1]["loss_scale"]
