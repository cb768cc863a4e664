"""Sums of gradients that bfloat16 cannot hold: a run's header says so."""

from dataclasses import replace

import pytest
import torch

from rwkv_peft.config import TrainConfig
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


def test_the_header_names_the_stage_that_adds_up_in_float32(train):
    flags = "--strategy", "deepspeed_stage_1", "--accumulate_grad_batches", str(MANY)
    out, _ = train("sums", *flags, "--epoch_steps", "1", "--epoch_count", "1")
    assert "--strategy deepspeed_stage_2 adds them up in float32" in out
