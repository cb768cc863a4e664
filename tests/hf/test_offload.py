"""A base model that accelerate keeps partly on disk: Bone reads each weight while it is loaded, and merges into it."""

import pytest
import torch
from bone_blocks import fill
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict

from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import BoneConfig

FORMS = (True, "bat-in", "bat-out")


@pytest.fixture
def offloaded(llama_folder, llama, tmp_path):
    """The LLaMA with every other layer on disk."""
    from transformers import AutoModelForCausalLM

    layers = {f"model.layers.{i}": ("cpu", "disk")[i % 2] for i in range(llama.config.num_hidden_layers)}
    others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        llama_folder, dtype=torch.float32, device_map=layers | others, offload_folder=tmp_path / "base"
    ).eval()
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    return model


def adapted(model, form):
    config = BoneConfig(r=4, target_modules="all-linear", init_weights=form)
    return fill(get_peft_model(model, config))


def step(model, ids):
    """Logits, and the gradient of each adapter."""
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits, [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("form", FORMS)
def test_training_and_merging_on_weights_from_disk(offloaded, llama, ids, form):
    plain, model = adapted(llama, form), adapted(offloaded, form)
    (expected, gradients), (logits, got) = step(plain, ids), step(model, ids)
    torch.testing.assert_close(logits, expected)
    for a, b in zip(got, gradients, strict=True):
        torch.testing.assert_close(a, b)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    assert layer.weight.is_meta  # it is away again
    layer.merge()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    layer.unmerge()
    assert layer.weight.is_meta
    merged = model.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_loaded_onto_a_base_that_is_partly_on_disk(offloaded, llama, ids, tmp_path, form):
    plain = adapted(llama, form).eval()
    plain.save_pretrained(tmp_path / "adapter")
    model = get_peft_model(offloaded, PeftConfig.from_pretrained(tmp_path / "adapter"))
    set_peft_model_state_dict(model, load_peft_weights(tmp_path / "adapter", device="cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_loading_where_peft_would_lose_the_adapter_is_refused(offloaded, llama, tmp_path):
    """peft writes adapters beside a base on disk only for LoRA, and silently loses those of other methods."""
    adapted(llama, True).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="no memory to be loaded into.* set_peft_model_state_dict"):
        PeftModel.from_pretrained(offloaded, tmp_path / "adapter", offload_folder=tmp_path / "more")
