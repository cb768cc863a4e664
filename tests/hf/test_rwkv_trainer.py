"""trl's SFTTrainer with Bone on an RWKV: the peft folder is merged by merge_bone.py, and the `rwkv` package draws the
merged model's tokens. benchmarks/hf_trainers.py shows the same for DPO, KTO and GRPO."""

from pathlib import Path

import pytest
import torch

from rwkv_peft.adapters.methods import by_hf_name
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.hf import BoneConfig, RWKVForCausalLM, RWKVTokenizer
from rwkv_peft.release.merge import main as merge
from rwkv_peft.release.runtimes import rwkv_sequence

BASE = Path(__file__).resolve().parents[2] / "demo" / "rwkv7-demo.pth"
STORY = "Ann has 3 red balls.\nQ: What color?\nA:"


@pytest.fixture
def trainer(tmp_path, form):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    rows = [{"prompt": STORY, "completion": " crimson\n"}, {"prompt": "Q: Say it\nA:", "completion": " Aye\n"}] * 4
    settings = dict(max_steps=4, learning_rate=5e-3, per_device_train_batch_size=4, lr_scheduler_type="constant")
    return SFTTrainer(
        RWKVForCausalLM.from_pth(BASE, dtype=torch.float32),
        SFTConfig(str(tmp_path / "out"), **settings, use_cpu=True, report_to=[], logging_steps=1, disable_tqdm=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=RWKVTokenizer("bytes"),
        peft_config=BoneConfig(r=16, init_weights=form),
    )


@pytest.mark.parametrize("form", ["bat-in"])
def test_a_trained_adapter_becomes_a_pth_that_the_rwkv_package_runs(trainer, form, tmp_path):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 2
    trainer.save_model(str(tmp_path / "adapter"))
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.metadata.variant == by_hf_name(form).name and len(adapter.modules()) == 18  # all but the head
    assert adapter.metadata.origin.base == "rwkv7-demo.pth"
    merged = tmp_path / "merged.pth"
    merge(f"--base_model {BASE} --bone_checkpoint {tmp_path}/adapter --output {merged} --output_dtype fp32".split())
    tokenizer, tokens = RWKVTokenizer("bytes"), torch.arange(1, 40)[None]
    in_one = trainer.model.merge_and_unload().eval()
    with torch.no_grad():
        torch.testing.assert_close(
            RWKVForCausalLM.from_pth(merged)(tokens).logits, in_one(tokens).logits, rtol=1e-3, atol=1e-3
        )
        prompt = tokenizer(STORY, return_tensors="pt").input_ids
        drawn = in_one.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0]
    logits = rwkv_sequence(merged, drawn, open_base(merged).config).clone()
    logits[:, 0] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(logits[prompt.shape[1] - 1 : -1].argmax(-1), drawn[prompt.shape[1] :])
