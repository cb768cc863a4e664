"""Bone's layers: forward, gradients, merging, several adapters, and the base layers that they take."""

import copy
from unittest.mock import patch

import pytest
import torch
import transformers
from bone_blocks import FORMS, fill, layer_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import prune

from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import BoneConfig, BoneLinear


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


class Scaled(nn.Linear):
    """A layer that computes more than the product with its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_only_look_linear_are_refused():
    with pytest.raises(UserError, match="0 is of type Scaled of torch.float32"):
        get_peft_model(nn.Sequential(Scaled(8, 8)), BoneConfig(r=4, target_modules=["0"]))
    eight_bit = nn.Linear(8, 8).to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match="0 is of type Linear of torch.float8_e4m3fn"):
        get_peft_model(nn.Sequential(eight_bit), BoneConfig(r=4, target_modules=["0"]))
    pruned = nn.Linear(8, 8)
    prune.random_unstructured(pruned, "weight", 0.5)
    for computed in (pruned, nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))):
        with pytest.raises(UserError, match="Linear with a weight that is computed from other tensors"):
            get_peft_model(nn.Sequential(computed), BoneConfig(r=4, target_modules=["0"]))
    with pytest.raises(UserError, match="inside of a MultiheadAttention"):
        get_peft_model(
            nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), BoneConfig(r=4, target_modules=["out_proj"])
        )


def gpt2():
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def falcon():
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", (gpt2, falcon))
def test_layers_of_other_classes_that_compute_a_linear_one(make, form):
    """GPT-2's Conv1D, whose weight is (in, out), and FalconLinear."""
    base, ids = make().eval(), torch.arange(10)[None]
    shapes = {key: value.shape for key, value in base.state_dict().items()}
    first = base(ids).logits
    settings = {"r": 4, "init_weights": form, "target_modules": "all-linear", "mini_r": 2 * (form == "mini")}
    model = get_peft_model(base, BoneConfig(**settings)).eval()
    assert sum(isinstance(module, BoneLinear) for module in model.modules()) == 8
    torch.testing.assert_close(model(ids).logits, first)
    fill(model, 0.2)
    blocks = [block for name, block in model.named_parameters() if "bone_block" in name]

    def passed():
        logits = model(ids).logits
        return logits, *torch.autograd.grad(logits.square().sum(), blocks)

    direct = passed()
    with patch.object(BoneLinear, "_adapted", lambda layer, x, name: layer._composed(x, [name])):
        torch.testing.assert_close(direct, passed(), rtol=1e-3, atol=1e-3)
    assert (direct[0] - first).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, direct[0], rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(ids).logits, direct[0], rtol=1e-3, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, direct[0], rtol=1e-3, atol=1e-4)
    assert {key: value.shape for key, value in merged.state_dict().items()} == shapes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", (["default"], ["default", "second"]))
def test_hooks_of_the_base_layer_are_called(form, names):
    base = nn.Linear(12, 8)
    layer = layer_of(form, base, bone_dropout=0.5 * (len(names) == 1))
    layer.update_layer("second", BoneConfig(r=4))
    layer.set_adapter(names)
    for block in layer.bone_block.values():
        nn.init.normal_(block, std=0.1)
    x, g, seen = torch.randn(5, 12, requires_grad=True), torch.randn(5, 8), []
    blocks = [layer.bone_block[n] for n in names]

    def step():
        torch.manual_seed(0)
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, *blocks), g)

    expected = step()
    handle = base.register_forward_hook(lambda module, args, output: seen.append(output))
    for a, b in zip(step(), expected, strict=True):
        torch.testing.assert_close(a, b)
    handle.remove()
    torch.testing.assert_close(seen[0], base(x))
    base.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(step()[0], expected[0] + base(x) / 2)


def test_a_layer_whose_weight_a_mixer_reads_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(UserError, match="mixer.dt_proj is inside of a MambaMixer, which reads its weight without"):
        get_peft_model(mamba, BoneConfig(r=2, target_modules=["in_proj", "dt_proj"]))
    get_peft_model(mamba, BoneConfig(r=2, target_modules=["in_proj"]))


def twice(module):
    return nn.Sequential(module, nn.ReLU(), module)


def test_a_layer_whose_parent_stands_in_two_places_is_merged_for_both():
    base = twice(nn.ModuleDict({"inner": nn.Linear(8, 8)}))
    model = get_peft_model(base, BoneConfig(r=4, target_modules=["inner"]))
    nn.init.normal_(base[0]["inner"].bone_block["default"], std=0.1)
    x = torch.randn(3, 8)
    expected = base[2]["inner"](base[0]["inner"](x))
    merged = model.merge_and_unload()
    assert merged[0] is merged[2]
    torch.testing.assert_close(merged[2]["inner"](merged[0]["inner"](x)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_float64_base_stays_exact(form):
    layer = layer_of(form, nn.Linear(12, 8).double())
    nn.init.normal_(layer.bone_block["default"], std=0.1)
    x, original = torch.randn(5, 12, dtype=torch.float64), layer.weight.data.clone()
    y = layer(x)
    torch.testing.assert_close(layer._composed(x, ["default"]), y)
    merged = original + layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(layer.weight.data, merged)
    torch.testing.assert_close(layer(x), y)
    layer.unmerge()
    torch.testing.assert_close(layer.weight.data, original, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ("4bit", "8bit"))
@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_layer_trains_as_its_dequantized_weight(kind, form):
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "4bit":
        base = bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32)
    else:
        base = bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False)
    base.load_state_dict(nn.Linear(64, 128).state_dict())
    base = base.to("cpu")  # which quantizes
    assert not base.weight.is_floating_point()
    config = BoneConfig(r=4, init_weights=form, mini_r=8 if form == "mini" else 0)
    layer = BoneLinear(base, "default", config)
    weight = layer.product.dequantize(base).float()
    plain = nn.Linear(64, 128)
    plain.weight.data, plain.bias.data = weight, base.bias.data.float()
    dense = BoneLinear(plain, "default", config)
    nn.init.normal_(layer.bone_block["default"], std=0.1)
    dense.bone_block["default"].data.copy_(layer.bone_block["default"])
    x, g = torch.randn(5, 64, requires_grad=True), torch.randn(5, 128)
    found, due = (torch.autograd.grad(one(x), (x, one.bone_block["default"]), g) for one in (layer, dense))
    torch.testing.assert_close(found, due)
    torch.testing.assert_close(layer(x), dense(x))
    with pytest.raises(UserError, match="is quantized, and merging.*without quantization"):
        layer.merge()


@pytest.mark.parametrize("before", (False, True), ids=("", "a base that ran before"))
def test_a_4_bit_base_reads_the_same_after_its_own_forward(before):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16))
    base[0].load_state_dict(nn.Linear(128, 64, bias=False).state_dict())
    base = base.to("cpu").eval()
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    weight = bnb.functional.dequantize_4bit(base[0].weight.data, base[0].weight.quant_state).float()
    with torch.no_grad():
        if before:
            base(x)
        model = get_peft_model(base, BoneConfig(r=16, init_weights="bat-in", target_modules=["0"])).eval()
        layer = model.base_model.model[0]
        with model.disable_adapter():
            model(x)
        read = layer.product.rows(layer.weight, slice(0, 64), torch.float32)
        torch.testing.assert_close(read, weight, atol=2e-3, rtol=1e-2)
        torch.testing.assert_close(model(x).float(), x.float() @ weight.t(), atol=3e-2, rtol=3e-2)
