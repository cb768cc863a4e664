"""Runs the command of demo/bone_finetuning.py on files of scripts/bone_llama.sh, and reads a run's results."""

import json

import torch

from rwkv_peft.hf import finetune

QUIET = (
    "--report_to none --logging_steps 1 --save_strategy no --disable_tqdm True --dataloader_pin_memory False".split()
)
SETTINGS = dict(report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, max_steps=2)
SETTINGS |= dict(learning_rate=1e-2, logging_steps=1, dataloader_pin_memory=False)  # the same for trl's trainers


def arguments(tiny, output, *flags):
    words = f"--base_model_name_or_path {tiny}/model --data_path {tiny}/data.jsonl --output_dir {output} --bone_r 16"
    return [*words.split(), *QUIET, *flags]


def run(tiny, output, *flags):
    return finetune.main(arguments(tiny, output, *flags))


def losses(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
