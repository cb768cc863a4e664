"""Runs the command of demo/bone_finetuning.py on files of scripts/bone_llama.sh, and reads a run's results."""

import json

import torch

from rwkv_peft.hf import finetune

QUIET = (
    *"--report_to none --logging_steps 1 --save_strategy no --disable_tqdm True".split(),
    *"--dataloader_pin_memory False".split(),
)


def run(tiny, output, *flags):
    return finetune.main(
        [
            "--base_model_name_or_path",
            str(tiny / "model"),
            "--data_path",
            str(tiny / "data.jsonl"),
            "--output_dir",
            str(output),
            "--bone_r",
            "16",
            *QUIET,
            *flags,
        ]
    )


def losses(output):
    return [
        row["loss"] for row in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
