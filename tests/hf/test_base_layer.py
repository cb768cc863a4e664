"""Base layers that Bone takes, and their hooks, precision and kind, which it keeps."""

import copy
import inspect
from unittest.mock import patch

import pytest
import torch
import transformers
from bone_blocks import FORMS, fill, layer_of
from peft import get_peft_model
from torch import nn
from torch.nn.utils import prune

from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import BoneConfig, BoneLinear


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


def pruned():
    layer = nn.Linear(8, 8)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize("layer", (pruned, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))))
def test_a_weight_that_is_computed_is_refused(layer):
    with pytest.raises(UserError, match="the weight of 0 is computed from other tensors"):
        get_peft_model(nn.Sequential(layer()), BoneConfig(r=4, target_modules=["0"]))


def test_a_merge_into_a_weight_that_is_computed_by_now_is_refused():
    layer = BoneLinear(nn.Linear(8, 8), "default", BoneConfig(r=4))
    prune.random_unstructured(layer.base_layer, "weight", 0.5)
    with pytest.raises(UserError, match="the weight of the layer is computed from other tensors"):
        layer.merge()
    prune.remove(layer.base_layer, "weight")
    layer.merge()


def test_a_layer_whose_weight_a_mixer_reads_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(UserError, match="mixer.dt_proj is inside of a MambaMixer, which reads its weight without"):
        get_peft_model(mamba, BoneConfig(r=2, target_modules=["in_proj", "dt_proj"]))
    get_peft_model(mamba, BoneConfig(r=2, target_modules=["in_proj"]))


@pytest.mark.parametrize(
    "place, target",
    [
        ("longcat_flash.modeling_longcat_flash.LongcatFlashTopkRouter", "classifier"),
        ("mobilebert.modeling_mobilebert.MobileBertLMPredictionHead", "dense"),
        ("mobilebert.modeling_mobilebert.MobileBertLMPredictionHead", "decoder"),
        ("detr.modeling_detr.DetrMHAttentionMap", "k_proj"),
        ("conditional_detr.modeling_conditional_detr.ConditionalDetrMHAttentionMap", "k_proj"),
        ("maskformer.modeling_maskformer.MaskFormerDetrMHAttentionMap", "k_proj"),
        ("dab_detr.modeling_dab_detr.DabDetrMHAttentionMap", "k_linear"),
    ],
)
def test_layers_whose_weights_other_modules_read_are_refused(place, target):
    path, _, name = place.rpartition(".")
    found = getattr(pytest.importorskip(f"transformers.models.{path}"), name, None)
    if found is None:
        pytest.skip(f"this transformers has no {name}")
    assert f"self.{target}.weight" in inspect.getsource(found)
    owner = found.__new__(found)  # of any widths
    nn.Module.__init__(owner)
    setattr(owner, target, nn.Linear(8, 8))
    with pytest.raises(UserError, match=f"0.{target} is inside of a {name}, which reads its weight without calling it"):
        get_peft_model(nn.Sequential(owner), BoneConfig(r=4, target_modules=[target]))


def twice(module):
    return nn.Sequential(module, nn.ReLU(), module)


@pytest.mark.parametrize("merge", ("merge_and_unload", "merge_adapter"))
def test_a_layer_in_two_places_is_merged_once_it_stands_in_one(merge):
    base = twice(nn.Linear(8, 8))
    config, x = BoneConfig(r=4, target_modules=["0"]), torch.randn(3, 8)
    model = get_peft_model(base, config)
    nn.init.normal_(base[0].bone_block["default"], std=0.1)
    expected, block, weight = model(x), base[0].bone_block["default"].data, base[2].weight.clone()
    with pytest.raises(UserError, match=r"0 shares its weight with 2, .* base.0 = copy.deepcopy\(base.0\)"):
        getattr(model, merge)()
    assert torch.equal(base[2].weight, weight)
    base = model.unload()
    assert base[0] is base[2]
    base[0] = copy.deepcopy(base[0])
    model = get_peft_model(base, config)
    base[0].bone_block["default"].data = block
    torch.testing.assert_close((getattr(model, merge)() or model)(x), expected)


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


def test_a_base_layer_that_is_replaced_is_used_or_refused():
    bnb = pytest.importorskip("bitsandbytes")
    layer, x = BoneLinear(nn.Linear(64, 64), "default", BoneConfig(r=4, init_weights="bat-in")), torch.randn(3, 64)
    nn.init.normal_(layer.bone_block["default"], std=0.1)
    quantized = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    quantized.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = quantized.to("cpu")
    torch.testing.assert_close(layer(x), quantized(x) + x @ layer.get_delta_weight("default").t(), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="is quantized, and merging"):
        layer.merge()
    layer.base_layer = Scaled(64, 64)
    with pytest.raises(UserError, match="the layer is of type Scaled"):
        layer(x)
