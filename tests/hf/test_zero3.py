"""Bone under DeepSpeed's ZeRO-3, which gathers a layer's weight only while it is in use."""

import json
import sys
from pathlib import Path

import pytest
import torch
from finetuning import QUIET

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


def test_training_under_zero_3_is_training_without_it():
    out, _ = finish(start([sys.executable, str(Path(__file__).with_name("zero3_steps.py"))]))
    traces = json.loads(out.split("TRACES ")[1])
    for plain, zero in traces.values():
        assert plain[0] > plain[1] > plain[2]
        assert zero == pytest.approx(plain, rel=1e-6)


def test_the_command_under_accelerates_zero_3_trains_and_merges_as_it_does_alone(tmp_path):
    from safetensors.torch import load_file

    from rwkv_peft.hf import finetune

    tiny_llama.write_model(tmp_path / "model")
    tiny_llama.write_data(tmp_path / "data.jsonl", 16)
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO_3))

    def arguments(output, *flags):
        return [
            "--base_model_name_or_path",
            str(tmp_path / "model"),
            "--data_path",
            str(tmp_path / "data.jsonl"),
            "--output_dir",
            str(tmp_path / output),
            *"--bone_r 16 --init_weights bat-in --bits fp32 --max_steps 3 --learning_rate 1e-2".split(),
            *"--merge_and_save".split(),
            *QUIET,
            *flags,
        ]

    finetune.main(arguments("plain"))
    command = [sys.executable, str(Path(__file__).with_name("zero3_command.py"))]
    command += arguments("zero3", "--deepspeed", str(tmp_path / "zero3.json"))
    finish(start(command))
    losses = [
        [
            row["loss"]
            for row in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            if "loss" in row
        ]
        for name in ("plain", "zero3")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
    plain, zero = (load_file(tmp_path / name / "bone_merged" / "model.safetensors") for name in ("plain", "zero3"))
    assert plain.keys() == zero.keys()
    for key in plain:
        torch.testing.assert_close(zero[key], plain[key], atol=1e-4, rtol=1e-4)
