"""Layers are made on the device that trains them if making them takes computation, one layer at a time. Moves are
recorded, not done, because there is no GPU here."""

import pytest
import torch
from torch import nn

from rwkv_peft.adapters import layer as layer_module
from rwkv_peft.adapters import lora_ga, pissa
from rwkv_peft.adapters.inject import inject
from rwkv_peft.models.parts import Table
from rwkv_peft.training.zero import share_buffers

GPU = torch.device("cuda", 1)


def recorded(monkeypatch, events):
    """Record moves, singular values and quantizations, and compute the latter two where the layer is."""

    def noted(name, function):
        return lambda *given, **named: events.append(name) or function(*given, **named)

    monkeypatch.setattr(nn.Module, "to", lambda self, device: events.append((type(self).__name__, device)) or self)
    for module in (pissa, lora_ga):
        monkeypatch.setattr(module, "svd_lowrank", noted("svd", module.svd_lowrank))
    monkeypatch.setattr(layer_module, "quantize", noted("quantize", layer_module.quantize))


THERE, BACK = ("Linear", GPU), ("AdapterLinear", torch.device("cpu"))


@pytest.mark.parametrize(
    "variant, quant, expected",
    [
        ("pissa", "none", [THERE, "svd", BACK]),
        ("lora-ga", "none", [THERE, "svd", BACK]),
        ("bone", "nf4", [THERE, "quantize", BACK]),
        ("pissa", "int8", [THERE, "svd", "quantize", BACK]),
        ("bat-in", "none", []),
    ],
)
def test_weights_are_taken_apart_and_quantized_on_the_device(variant, quant, expected, adapter_config, monkeypatch):
    if quant != "none":
        pytest.importorskip("bitsandbytes")
    results = []
    for device in (None, GPU):
        torch.manual_seed(0)
        model, gradient, events = nn.ModuleDict({"layer": nn.Linear(64, 32)}), torch.randn(32, 64), []
        with monkeypatch.context() as patch:
            recorded(patch, events)
            config = adapter_config(variant, quant=quant, svd_niter=4)
            inject(model, config, gradients={"layer": gradient}, device=device)
        results.append([*model["layer"].parameters(), *model["layer"].buffers()])
    assert events == expected
    assert all(map(torch.equal, *results))


def test_ranks_share_buffers_on_their_devices_and_leave_frozen_tables_in_the_file(adapter_config, monkeypatch):
    model, shared = nn.ModuleDict({"layer": nn.Linear(64, 32), "table": Table(10, 4)}), []
    inject(model, adapter_config("pissa"))
    model["table"].settle()
    model.to("meta")
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: shared.append((tensor, source)))
    before = model["table"].weight._version
    share_buffers(model, torch.device("meta"))
    own = [*model["layer"].buffers()]
    assert [(id(tensor), source) for tensor, source in shared] == [(id(tensor), 0) for tensor in own] and len(own) == 2
    assert model["table"].weight._version == before and model["table"].weight.is_cpu
