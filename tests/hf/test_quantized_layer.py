"""Bone's layers over quantized weights."""

import pytest
import torch
from bone_blocks import FORMS
from peft import get_peft_model
from torch import nn

from rwkv_peft.cli.errors import UserError
from rwkv_peft.hf import BoneConfig, BoneLinear


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
