"""Bone's layers in a LLaMA: forward, gradients, merging, several adapters, quantized and bf16 bases."""

import copy

import pytest
import torch
from bone_blocks import FORMS, fill, layer_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import BoneConfig, BoneLinear, installed


def adapted(model, init_weights, std=0.02, **settings):
    settings = {"r": 4, "target_modules": "all-linear", "mini_r": 4 if init_weights == "mini" else 0} | settings
    return fill(get_peft_model(model, BoneConfig(init_weights=init_weights, **settings)), std)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_adapter_changes_nothing(llama, ids, form):
    base = logits(llama, ids)
    assert torch.equal(logits(adapted(llama, form, std=0).eval(), ids), base)


def test_false_starts_at_random(llama):
    model = get_peft_model(llama, BoneConfig(r=4, init_weights=False))
    assert all(block.std() > 0.01 for name, block in model.named_parameters() if "bone_block" in name)


@pytest.mark.parametrize("form", FORMS)
def test_merging_reproduces_the_adapter_and_unmerging_the_base(llama, ids, form):
    weights = copy.deepcopy(llama.state_dict())
    base = logits(llama, ids)
    model = adapted(llama, form).eval()
    expected = logits(model, ids)
    assert (expected - base).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), base)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-4, rtol=1e-4)
    left, right = ({key: value.shape for key, value in one.items()} for one in (merged.state_dict(), weights))
    assert left == right


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_merged_weight(form):
    layer = layer_of(form, nn.Linear(12, 8))
    block = nn.init.normal_(layer.bone_block["default"], std=0.1)
    x, g = torch.randn(5, 12, requires_grad=True), torch.randn(5, 8)
    got = torch.autograd.grad(layer(x), (x, block), g)
    twice = layer._composed(x, ["default"])
    for a, b in zip(got, torch.autograd.grad(twice, (x, block), g), strict=True):
        torch.testing.assert_close(a, b)


def test_two_active_adapters_act_as_merging_both(llama, ids):
    model = adapted(llama, "bat-in")
    model.add_adapter("second", BoneConfig(r=4, init_weights=True, target_modules=["q_proj", "o_proj", "down_proj"]))
    fill(model, seed=1)
    model.eval()
    first = logits(model, ids)
    model.set_adapter("second")
    second = logits(model, ids)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, ids)
    assert (first - second).abs().max() > 0.1 and (both - first).abs().max() > 0.1
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), both, atol=1e-4, rtol=1e-4)


def test_all_linear_is_never_the_inside_of_an_adapter(llama):
    """peft 0.14 takes the layers inside the first adapter as targets of a second one."""
    model, config = adapted(llama, True), BoneConfig(r=4, target_modules="all-linear")
    before = sum(isinstance(module, BoneLinear) for module in model.modules())
    if installed.version() < (0, 15):
        with pytest.raises(UserError, match="inside of an adapter's layer; name the target_modules"):
            model.add_adapter("second", config)
    else:
        model.add_adapter("second", config)
        layers = [module for module in model.modules() if isinstance(module, BoneLinear)]
        assert sum("second" in layer.bone_block for layer in layers) == before


def test_a_layer_with_another_methods_adapter_is_refused(llama):
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(UserError, match="has an adapter of another method, Linear; merge or unload"):
        get_peft_model(model, BoneConfig(r=4, target_modules=["q_proj"]))


def test_a_model_that_peft_holds_is_not_wrapped_again(llama, ids, tmp_path):
    base, config = copy.deepcopy(llama), BoneConfig(r=4, init_weights=False, target_modules=["q_proj"])
    model = get_peft_model(llama, config)
    with pytest.raises(UserError, match=r"is a PeftModel already; give its base, .* model.add_adapter\(name, config\)"):
        get_peft_model(model, BoneConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded, kept = PeftModel.from_pretrained(base, tmp_path), model.eval()
        assert torch.equal(loaded(ids).logits, kept(ids).logits)
    get_peft_model(model.unload(), BoneConfig(r=4, target_modules=["q_proj"]))


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_of_a_model_is_as_good(llama, ids, form):
    model = adapted(llama, form).eval()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), logits(model, ids))
    twin.merge_adapter()
    torch.testing.assert_close(logits(twin, ids), logits(model, ids), atol=1e-4, rtol=1e-4)


def test_an_adapter_can_be_deleted(llama, ids):
    model = adapted(llama, True)
    expected = logits(model, ids)
    model.add_adapter("second", BoneConfig(r=2, init_weights="bat-in", target_modules=["q_proj", "up_proj"]))
    model.delete_adapter("second")
    assert not any("second" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model, ids), expected)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_hides_inputs_from_the_adapter_alone(form):
    base = nn.Linear(12, 8)
    layer = layer_of(form, base, bone_dropout=0.5).train()
    x = torch.randn(64, 12)
    torch.testing.assert_close(layer(x), base(x))  # a fresh adapter sees less and still adds nothing
    nn.init.normal_(layer.bone_block["default"], std=0.1)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    seen = layer.bone_dropout["default"](x)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(y, base(x) + seen @ delta.t())
    torch.testing.assert_close(layer.eval()(x), base(x) + x @ delta.t())


@pytest.mark.parametrize("form", FORMS)
def test_a_bf16_base_is_as_exact_as_plain_bf16(llama, ids, form):
    exact = adapted(copy.deepcopy(llama), form).eval()
    plain = logits(exact.merge_and_unload().bfloat16(), ids)
    exact = logits(adapted(copy.deepcopy(llama), form).eval(), ids)
    model = adapted(llama.bfloat16(), form)
    assert all(block.dtype == torch.float32 for name, block in model.named_parameters() if "bone_block" in name)
    assert (logits(model.eval(), ids) - exact).abs().mean() < 2 * (plain - exact).abs().mean()


def test_a_broken_adapter_is_not_merged(llama):
    model = adapted(llama, True)
    layer = next(module for module in model.modules() if isinstance(module, BoneLinear))
    layer.bone_block["default"].data.fill_(float("nan"))
    before = layer.weight.clone()
    with pytest.raises(UserError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 48, "init_weights": "bat-in"}, "bat-in: r=4[0-9]* does not divide .*try r="),
        ({"r": 48, "init_weights": "bat"}, "bat-out: r=48 does not divide 64"),
        ({"r": 1000}, "r=1000 is more than 64"),
        ({"r": 4, "init_weights": "mini", "mini_r": 7}, "mini_r=7 does not divide"),
        ({"r": 4, "target_modules": ["embed_tokens"]}, "embed_tokens is of type Embedding, and Bone works on"),
    ],
)
def test_what_does_not_fit_a_layer_is_refused(llama, settings, message):
    with pytest.raises(UserError, match=message):
        get_peft_model(llama, BoneConfig(**{"target_modules": ["q_proj", "k_proj"]} | settings))


def test_a_refused_target_leaves_the_model_as_it_was(llama):
    names = [name for name, _ in llama.named_modules()]
    with pytest.raises(UserError, match="r=16"):
        get_peft_model(llama, BoneConfig(r=16, init_weights="bat-in", target_modules="all-linear"))
    assert [name for name, _ in llama.named_modules()] == names
    model = get_peft_model(llama, BoneConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with pytest.raises(UserError, match="r=16"):
        model.add_adapter("second", BoneConfig(r=16, init_weights="bat-in", target_modules=["q_proj", "down_proj"]))
    assert all(list(layer.bone_block) == ["default"] for layer in model.modules() if isinstance(layer, BoneLinear))


def test_a_file_of_another_form_is_not_taken_for_an_old_one(llama):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    trained = get_peft_model_state_dict(adapted(copy.deepcopy(llama), "bat-in", target_modules=["q_proj"]))
    model = adapted(llama, True, target_modules=["q_proj"])
    with pytest.raises(UserError, match="holds a block affine adapter"):
        set_peft_model_state_dict(model, trained)


def test_one_adapter_a_batch(llama, ids):
    model = adapted(llama, "bat-in")
    with pytest.raises(UserError, match="adapter_names"):
        model(input_ids=ids, adapter_names=["default", "__base__"])


def test_a_merge_that_cannot_be_undone_stays(llama):
    model = adapted(llama, "bat-out", std=0, target_modules=["q_proj"])
    layers = [layer for layer in model.modules() if isinstance(layer, BoneLinear)]
    for layer in layers:
        layer.bone_block["default"].data -= torch.eye(4)
    model.merge_adapter()
    with pytest.raises(UserError, match="cannot be undone: an I . B .* has no inverse"):
        model.unmerge_adapter()
    assert layers[0].merged


@pytest.mark.parametrize("merge", ("merge_and_unload", "merge_adapter"))
def test_merging_an_adapter_that_is_not_there_is_refused(llama, merge):
    model = adapted(llama, True, target_modules=["q_proj"])
    with pytest.raises(UserError, match="there is no adapter 'second'; give a list of some of default"):
        getattr(model, merge)(adapter_names=["second"])
    assert any(isinstance(layer, BoneLinear) for layer in model.modules())


@pytest.mark.parametrize("merge", ("merge_and_unload", "merge_adapter"))
def test_a_tied_head_is_merged_once_it_has_a_weight_of_its_own(llama, ids, tmp_path, merge):
    llama.config.tie_word_embeddings = True
    llama.lm_head.weight = llama.model.embed_tokens.weight
    untied = copy.deepcopy(llama)
    model = adapted(llama, "bat-in", target_modules=["q_proj", "lm_head"]).eval()
    expected, embeddings = logits(model, ids), llama.model.embed_tokens.weight.clone()
    with pytest.raises(UserError, match=r"lm_head shares its weight with model.embed_tokens, .* base.lm_head.weight "):
        getattr(model, merge)()
    assert torch.equal(llama.model.embed_tokens.weight, embeddings)
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.config.tie_word_embeddings = False
    model = PeftModel.from_pretrained(untied, tmp_path)
    model = getattr(model, merge)() or model
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
