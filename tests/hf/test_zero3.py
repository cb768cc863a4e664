"""Bone under DeepSpeed's ZeRO-3, which gathers a layer's weight only while it is in use."""

import json
import sys
from pathlib import Path

import pytest
import torch
from finetuning import arguments, run
from finetuning import losses as losses_of

import tiny_llama
from training.runs import finish, start

ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def test_the_command_under_accelerates_zero_3_trains_and_merges_as_it_does_alone(tmp_path):
    from safetensors.torch import load_file

    tiny_llama.write_model(tmp_path / "model")
    tiny_llama.write_data(tmp_path / "data.jsonl", 16)
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO_3))
    flags = "--init_weights bat-in --bits fp32 --max_steps 3 --learning_rate 1e-2 --merge_and_save".split()
    run(tmp_path, tmp_path / "plain", *flags)
    flags += ["--deepspeed", str(tmp_path / "zero3.json")]
    command = [sys.executable, str(Path(__file__).with_name("zero3_command.py"))]
    finish(start(command + arguments(tmp_path, tmp_path / "zero3", *flags)))
    losses = [losses_of(tmp_path / name) for name in ("plain", "zero3")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
    plain, zero = (load_file(tmp_path / name / "bone_merged" / "model.safetensors") for name in ("plain", "zero3"))
    assert plain.keys() == zero.keys()
    for key in plain:
        torch.testing.assert_close(zero[key], plain[key], atol=1e-4, rtol=1e-4)
