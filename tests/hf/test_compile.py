"""torch.compile captures models with Bone as a whole, as it does models with peft's own layers, and computes the same.

The graph is captured and differentiated as for any backend ("aot_eager" then runs it by plain kernels, which
needs no compiler).
"""

import copy

import pytest
import torch
from bone_blocks import fill
from peft import get_peft_model
from torch import nn

from rwkv_peft.hf import BoneConfig


def gradients(model, run):
    """The loss and the gradients of the adapters."""
    torch._dynamo.reset()
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    loss = run()
    loss.backward()
    return loss, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)


def check(model, run, **settings):
    """Compiled and plain, forward and backward; fullgraph makes any break of the graph an error."""
    expected = gradients(model, lambda: run(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model, lambda: run(compiled)), expected, **settings)


def adapted(model, form, **settings):
    config = BoneConfig(r=4, init_weights=form, mini_r=4 if form == "mini" else 0, **settings)
    return fill(get_peft_model(model, config), 0.1).train()


HOWS = [("bat-in", "autocast"), ("bat-in", "dropout"), (True, "two adapters")]


@pytest.mark.parametrize("form, how", [*((form, "plain") for form in (True, "bat-in", "bat-out", "mini")), *HOWS])
def test_linear_layers(form, how):
    settings = {"target_modules": ["0", "2"], "bone_dropout": 0.5 if how == "dropout" else 0.0}
    model = adapted(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64)), form, **settings)
    if how == "two adapters":
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        fill(model, 0.1).base_model.set_adapter(["default", "second"])
    x = torch.randn(2, 5, 64)

    def run(model):
        with torch.autocast("cpu", enabled=how == "autocast"):
            return model(x).float().square().mean()

    check(model, run, **({"atol": 2e-2, "rtol": 2e-2} if how == "autocast" else {}))


@pytest.mark.parametrize("kind", ("4bit", "8bit"))
def test_a_quantized_layer(kind):
    bnb = pytest.importorskip("bitsandbytes")
    if kind == "4bit":
        base = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    else:
        base = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    model = adapted(nn.Sequential(base.to("cpu")), "bat-in", target_modules=["0"])
    x = torch.randn(2, 5, 64)
    check(model, lambda model: model(x).square().mean())


def test_a_llama(llama, ids):
    llama.model.layers = llama.model.layers[:1]
    model = adapted(llama, "bat-in", target_modules="all-linear")
    check(model, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss, atol=1e-4, rtol=1e-4)
