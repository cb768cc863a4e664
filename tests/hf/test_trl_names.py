"""The method's quick start runs with the installed trl, in the argument names that it was written with."""

import pytest
import torch
from finetuning import SETTINGS

import tiny_llama
from rwkv_peft.hf import BoneConfig

pytest.importorskip("trl")
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from rwkv_peft.hf.sft import SFTConfig, SFTTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama.write_model(folder)
    return folder


def trainer(folder, tmp_path, config, **arguments):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, BoneConfig(r=16, target_modules="all-linear"))
    rows = Dataset.from_list([{"text": f"{i} and {i} make {2 * i}, as everybody knows"} for i in range(16)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SFTTrainer(model=model, args=config, train_dataset=rows, tokenizer=tokenizer, **arguments)


def check(trainer):
    assert trainer.args.max_length == 8
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == 8
    trainer.train()
    assert any(p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "bone_" in name)


def test_the_quick_start_as_peft_and_pissa_have_it(folder, tmp_path):
    config = SFTConfig(output_dir=str(tmp_path), dataset_text_field="text", max_seq_length=8, **SETTINGS)
    check(trainer(folder, tmp_path, config))


def test_settings_of_the_data_given_to_the_trainer(folder, tmp_path):
    config = TrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    check(trainer(folder, tmp_path, config, dataset_text_field="text", max_seq_length=8))
    assert not hasattr(config, "max_length")


def test_both_names_of_one_argument_are_refused():
    with pytest.raises(TypeError, match="max_seq_length= is the older name of max_length="):
        SFTConfig(max_seq_length=8, max_length=8)
