"""trl's preference training of an adapter that is trained already compares with that adapter, and not with the base."""

import math

import pytest
import torch
from bone_blocks import fill
from finetuning import SETTINGS
from peft import PeftModel, get_peft_model

import tiny_llama
from rwkv_peft.hf import BoneConfig

pytest.importorskip("trl")
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

ROWS = [{"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}] * 4


@pytest.mark.parametrize("form", (True, "bat-in"))
def test_the_first_loss_is_that_of_equal_models(tmp_path, form):
    tiny_llama.write_model(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = BoneConfig(r=16, init_weights=form, target_modules=["q_proj", "v_proj"])
    fill(get_peft_model(base, config), 0.1).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True),
        args=DPOConfig(output_dir=str(tmp_path / "out"), **SETTINGS),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "base"),
    )
    trainer.train()
    first, second = (record for record in trainer.state.log_history if "rewards/margins" in record)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["rewards/chosen"] == pytest.approx(
        0, abs=1e-5
    )
    assert second["loss"] < first["loss"]  # the adapter has moved, and the copy of it has not


def test_another_adapter_of_the_same_settings_begins_anew(llama):
    config = BoneConfig(r=4, target_modules=["q_proj"])
    model = fill(get_peft_model(llama, config), 0.1)
    model.add_adapter("second", config)
    model.add_adapter("ref", BoneConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "bone_block" in name:
            assert bool(parameter.any()) == name.endswith(".default"), name
