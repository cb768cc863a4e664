"""Adapter folders: saved and loaded, of peft 0.18, and of its pre-release."""

import copy
import json

import numpy as np
import pytest
import torch
from bone_blocks import fill
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import BoneConfig, register


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def save(model, folder, **settings):
    model = fill(get_peft_model(model, BoneConfig(**{"r": 4, "target_modules": "all-linear"} | settings)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings", [{}, {"init_weights": "bat"}, {"init_weights": "bat-in"}, {"init_weights": "mini", "mini_r": 4}]
)
def test_a_saved_adapter_is_loaded(llama, ids, tmp_path, settings):
    expected = logits(save(copy.deepcopy(llama), tmp_path, **settings), ids)
    assert torch.equal(logits(PeftModel.from_pretrained(llama, tmp_path), ids), expected)


def test_modules_to_save_travel_along(llama, ids, tmp_path):
    model = save(copy.deepcopy(llama), tmp_path, target_modules=["q_proj"], modules_to_save=["norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama, tmp_path), ids), logits(model, ids))


class Biased(torch.nn.Module):
    """Linear layers with biases, and one among them that is not adapted."""

    def __init__(self):
        super().__init__()
        self.down, self.other, self.up = torch.nn.Linear(16, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 16)

    def forward(self, x):
        return self.up(self.other(self.down(x)).relu())


@pytest.mark.parametrize(
    "bias, trained", [("none", set()), ("bone_only", {"down", "up"}), ("all", {"down", "other", "up"})]
)
def test_biases_that_are_trained_are_saved(tmp_path, bias, trained):
    base, x = Biased(), torch.randn(3, 16)
    config = BoneConfig(r=4, init_weights="bat-in", target_modules=["down", "up"], bias=bias)
    if trained and register.version() < register.SAVES_BIASES:
        with pytest.raises(UserError, match="would not save them; take peft 0.21"):
            get_peft_model(copy.deepcopy(base), config)
        return
    model = fill(get_peft_model(copy.deepcopy(base), config), 0.1)
    biases = [name for name, parameter in model.named_parameters() if "bias" in name and parameter.requires_grad]
    assert {name.split(".")[2] for name in biases} == trained
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), expected)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_auto_peft_model_finds_base_and_adapter(llama_folder, llama, ids, tmp_path):
    expected = logits(save(llama, tmp_path, init_weights="bat-in"), ids)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config.update(base_model_name_or_path=str(llama_folder), task_type="CAUSAL_LM")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path), ids), expected)


def test_an_adapter_of_peft_0_18_gives_its_golden_logits(shared_data):
    from transformers import AutoModelForCausalLM

    folder = shared_data / "peft_bone_adapters" / "bone_r4"
    golden = {key: torch.tensor(value) for key, value in np.load(folder / "golden.npz").items()}
    base = AutoModelForCausalLM.from_pretrained(shared_data / "llama_stories260K_hf", dtype=torch.float32)
    drift = (logits(base, golden["ids"]) - golden["base"]).abs().max()  # of the base itself, by other kernels
    tolerance = max(1e-5, 2 * drift)
    model = PeftModel.from_pretrained(base, folder)
    assert (golden["adapted"] - golden["base"]).abs().max() > 1
    assert (logits(model, golden["ids"]) - golden["adapted"]).abs().max() < tolerance < 1e-4
    merged = model.merge_and_unload(safe_merge=True)
    assert (logits(merged, golden["ids"]) - golden["merged"]).abs().max() < tolerance


def test_a_pre_release_folder_says_true_and_holds_block_affine_tensors(llama, ids, tmp_path):
    expected = logits(save(copy.deepcopy(llama), tmp_path, init_weights="bat"), ids)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_weights": True}))
    model = PeftModel.from_pretrained(llama, tmp_path)
    assert torch.equal(logits(model, ids), expected)
    assert model.peft_config["default"].method.name == "bat-out"
