"""DeepSpeed's ZeRO: memory of stage 3, norms and sums of gradients, and the loss scale of --precision fp16."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from safetensors.torch import load_file
from torch import distributed

from families import DISTINCT
from rwkv_peft.adapters.inject import InjectReport
from rwkv_peft.checkpoints.tensors import read_safetensors, save_safetensors
from rwkv_peft.config import TrainConfig
from rwkv_peft.objectives.cross_entropy import linear_cross_entropy
from rwkv_peft.objectives.divergence import Divergence, linear_divergence
from rwkv_peft.ops.recurrence.kernels import CpuRecurrence
from rwkv_peft.training.engine import MANY, SHORT, loses_in_sums, square_sum
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.header import describe
from rwkv_peft.training.inputs import find_inputs
from rwkv_peft.training.saving.checkpoints import STATE, read_state, record_of, write_state
from rwkv_peft.training.saving.optimizer_state import METADATA_KEY, SCALE, SavedOptimizer
from rwkv_peft.training.zero import NOT_FINITE, norm_over_ranks
from training.runs import finish, metrics, rewound, start_ranks
from training.test_teachers import write_model

LOSING = TrainConfig(precision="bf16", strategy="deepspeed_stage_1", devices=2, accumulate_grad_batches=MANY)
FP16 = "--precision fp16 --train_parts ln time --lr_schedule constant".split()
COUNT, LOSS_SCALE = 2.0**20, 2.0**16
# train.py up to its first step, which writes the private memory that cutting the parameters takes at most, and the size
# of all of them
MEASURED = """
import json, os
from pathlib import Path

import torch

from rwkv_peft.cli.commands import run
from rwkv_peft.cli.errors import UserError
from rwkv_peft.training import zero

def private():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

def set_up(model, *arguments):
    from deepspeed.runtime.zero.partition_parameters import Init

    def note(init, parameter):
        found.append(private() - before)
        cut(init, parameter)

    found, size, before = [], sum(parameter.nbytes for parameter in model.parameters()), private()
    cut, Init._zero_init_param = Init._zero_init_param, note
    whole(model, *arguments)
    Path(f"{file}-{{os.environ['RANK']}}").write_text(json.dumps([max(found), size]))
    torch.distributed.barrier()
    raise UserError("measured")

whole, zero.partition = zero.partition, set_up
run("train")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("strategy", ["deepspeed_stage_3", "deepspeed_stage_3_offload"])
def test_a_rank_of_stage_3_never_holds_the_whole_base(files, command, strategy, quick_compiler):
    """It cuts the mapped file parameter by parameter: two ranks hold half of it each, and one parameter more."""
    base = write_model(files / "large.pth", DISTINCT[1], n_layer=8, n_embd=512, head_size=64)
    argv = command(strategy, "--load_model", str(base), "--strategy", strategy, "--devices", "2")
    script, file = files / f"{strategy}.py", files / f"peak-{strategy}"
    script.write_text(MEASURED.format(file=file))
    for rank in start_ranks([sys.executable, str(script), *argv[2:]]):
        finish(rank, 2)
    for rank in range(2):
        peak, size = json.loads((files / f"{file.name}-{rank}").read_text())
        assert peak < 0.7 * size, (peak, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (SHORT - 1,), (3, SHORT), (SHORT, 7), (500_001,)])
def test_a_sum_of_squares_is_that_of_float64(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    assert square_sum(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6, abs=0)


def test_the_norm_of_several_and_one_that_is_not_finite(monkeypatch):
    groups = []
    monkeypatch.setattr(distributed, "all_reduce", lambda total, group: groups.append(group))
    optimizer = SimpleNamespace(device="cpu", dp_process_group="all")
    gradients = [torch.full((3, 5), 2.0), torch.zeros(7), torch.full((1,), 2.0)]
    assert norm_over_ranks(optimizer, gradients).item() == 8.0 and groups == ["all"]
    for value in (float("inf"), float("nan")):
        assert norm_over_ranks(optimizer, [*gradients, torch.tensor([value])]).item() == NOT_FINITE


def test_deepspeed_has_what_the_engine_replaces():
    """Otherwise it would replace nothing, silently."""
    assert callable(DeepSpeedZeroOptimizer.get_grad_norm_direct)


def test_a_sum_in_bfloat16_stands_still_from_there_on():
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(2 * MANY):
        total += 1
    assert total == MANY


@pytest.mark.parametrize(
    "other",
    [
        {"accumulate_grad_batches": MANY - 1},
        {"precision": "fp32"},
        {"strategy": "deepspeed_stage_2"},
        {"strategy": "deepspeed_stage_2_offload"},
        {"devices": 1},
    ],
)
def test_what_loses_is_told_from_what_does_not(other):
    assert loses_in_sums(LOSING) and loses_in_sums(replace(LOSING, strategy="deepspeed_stage_3"))
    assert not loses_in_sums(replace(LOSING, **other))


def test_the_header_names_the_stage_that_adds_up_in_float32(command):
    flags, said = ("--devices", "2", "--accumulate_grad_batches", str(MANY)), []
    inputs = find_inputs(parse_run(command("sums", *flags)[2:]))
    describe(inputs, "cpu", (), InjectReport((), 0, 1), said.append)
    (note,) = [line for line in said if "gradients a step" in line]
    assert f"note: {MANY} gradients a step are added up" in note
    assert note.endswith("--strategy deepspeed_stage_2 adds them up in float32")


def test_the_header_of_a_gpus_run_compiles_no_recurrence_for_the_cpu(command, monkeypatch):
    compiled, said = [], []
    monkeypatch.setattr(CpuRecurrence, "unavailable", lambda self, level="": compiled.append(self.op))
    inputs = find_inputs(parse_run(command("gpu")[2:]))
    describe(inputs, "gpu", (), InjectReport((), 0, 1), said.append)
    assert compiled == [] and any(line.startswith("machine ") and " gpu, " in line for line in said)
    describe(inputs, "cpu", (), InjectReport((), 0, 1), said.append)
    assert len(compiled) == 1


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
    train("whole", *FP16)
    for name in ("parts", "high"):
        rewound(files / "whole", name)
    train("parts", *FP16, "--resume")
    whole, parts = ((files / name / "adapter.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts and load_file(files / "whole" / "adapter.safetensors").popitem()[1].dtype == torch.float16
    assert [line["loss_scale"] for line in metrics(files, "whole")] == [2.0**16] * 8

    checkpoint = files / "high" / "checkpoints" / "step-00000004"
    with_scale(checkpoint, 2.0**21)
    told, _ = train("high", *FP16, "--resume")
    lines = metrics(files, "high")[4:]
    assert "step skipped: loss scale" in told
    skips = [line["skipped"] for line in lines]
    assert skips[0] == 1 and lines[0]["grad_norm"] is None and lines[0]["loss_scale"] == 2.0**20
    assert [line["loss_scale"] for line in lines] == [2.0 ** (21 - sum(skips[: n + 1])) for n in range(4)]
    assert lines[0]["loss"] == metrics(files, "whole")[4]["loss"]
    saved = SavedOptimizer(files / "high" / "checkpoints" / "step-00000008")
    assert saved.steps == 8 - sum(skips) and saved.scale["cur_scale"] == lines[-1]["loss_scale"]
