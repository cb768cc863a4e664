"""Sums of gradients that bfloat16 cannot hold: a run's header says so."""

from dataclasses import replace

import pytest
import torch

from rwkv_peft.adapters.inject import InjectReport
from rwkv_peft.config import TrainConfig
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.header import describe
from rwkv_peft.training.inputs import find_inputs
from rwkv_peft.training.step.zero import MANY, loses_in_sums

LOSING = TrainConfig(precision="bf16", strategy="deepspeed_stage_1", accumulate_grad_batches=MANY)


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
    ],
)
def test_what_loses_is_told_from_what_does_not(other):
    assert loses_in_sums(LOSING) and loses_in_sums(replace(LOSING, strategy="deepspeed_stage_3"))
    assert not loses_in_sums(replace(LOSING, **other))


def test_the_header_names_the_stage_that_adds_up_in_float32(command):
    flags, said = ("--strategy", "deepspeed_stage_1", "--accumulate_grad_batches", str(MANY)), []
    inputs = find_inputs(parse_run(command("sums", *flags)[2:]))
    describe(inputs, "cpu", (), InjectReport((), 0, 1), said.append)
    (note,) = [line for line in said if "bfloat16" in line]
    assert f"note: {MANY} gradients a step are added up" in note
    assert note.endswith("--strategy deepspeed_stage_2 adds them up in float32")
