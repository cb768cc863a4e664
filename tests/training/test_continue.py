"""Continuing from an adapter (bone_load, lora_load, pissa_load): what must agree, also for RWKV-PEFT's files, which
say less."""

from dataclasses import replace

import pytest
import torch

from adapters.layers import tensors_of
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.layer import AdapterLinear
from rwkv_peft.checkpoints.adapter_file import Adapter, AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import base_of, save_model
from rwkv_peft.checkpoints.rwkv_peft_file import write_rwkv_peft
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv6.model import RWKV6
from rwkv_peft.training.model import adapt, start_adapter

RWKV6_FAMILY = family_named("x060")
LORA = AdapterConfig(method="lora", rank=4, alpha=8.0)
PISSA = AdapterConfig(method="pissa", rank=4)
BONE = AdapterConfig(mode="bone", rank=8)


@pytest.fixture(scope="module")
def base(tiny_state):
    return tiny_state()


def new_model(base):
    model = RWKV6(base_of(base).config)
    model.load_state_dict(base)
    return model


@torch.no_grad()
def trained(base, config):
    """(a model with an adapter that is not fresh, the Adapter)."""
    torch.manual_seed(0)
    model = new_model(base)
    inject(model, config, family=RWKV6_FAMILY)
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLinear):
            for parameter in layer.method.parameters:
                getattr(layer, parameter).add_(torch.randn_like(getattr(layer, parameter)), alpha=0.1)
            tensors |= {f"{name}.{key}": tensor.clone() for key, tensor in tensors_of(layer).items()}
    return model, Adapter(tensors, AdapterMetadata.from_config(config))


@pytest.mark.parametrize("config", [LORA, PISSA, BONE], ids=lambda config: config.method)
def test_a_file_of_rwkv_peft_goes_on_where_it_stopped(base, tmp_path, config):
    model, adapter = trained(base, config)
    written = write_rwkv_peft(tmp_path / "rwkv-0.pth", adapter)
    load = replace(config, load=str(written[0]), init=str(written[1]) if config.method == "pissa" else "")
    again = new_model(base)
    adapt(again, load, None, RWKV6_FAMILY, base_of(base), None)
    tokens = torch.arange(1, 21)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens)[0], model(tokens)[0])
        assert not torch.equal(new_model(base)(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize(
    "config, words",
    [
        (PISSA, "init_pissa.pth .* as pissa_init in --pissa_config"),
        (replace(LORA, alpha=0.0), "lora_alpha in --lora_config"),
    ],
)
def test_what_a_file_of_rwkv_peft_does_not_say_is_asked_for(base, tmp_path, config, words):
    path = write_rwkv_peft(tmp_path / "rwkv-0.pth", trained(base, config)[1])[0]
    with pytest.raises(UserError, match=words):
        start_adapter(replace(config, load=str(path)), base_of(base))


def test_a_file_of_rwkv_peft_of_another_kind_is_told_as_what_it_is(base, tmp_path):
    bone, lora = (write_rwkv_peft(tmp_path / f"{c.method}.pth", trained(base, c)[1])[0] for c in (BONE, LORA))
    states = tmp_path / "states.pth"
    save_model(states, {f"blocks.{n}.att.time_state": torch.ones(4, 16, 16) for n in range(2)})
    for config, path, words in (
        (replace(BONE, mode="bat-in"), bone, "holds a bone adapter, and this run trains bat-in; .*--bone_mode bone"),
        (LORA, bone, "holds a bone adapter, and this run trains lora; give --peft bone --bone_mode bone"),
        (BONE, lora, "holds a LoRA or PiSSA adapter, and this run trains bone; give --peft lora or pissa"),
        (BONE, states, "holds no adapter, but time states; give it as --state_load with --train_parts state"),
    ):
        with pytest.raises(UserError, match=words):
            start_adapter(replace(config, load=str(path)), base_of(base))


@pytest.mark.parametrize(
    "config, now, words",
    [
        (LORA, {"alpha": 128.0}, ["scale", "of 2,", "has 32;", "give 8 as lora_alpha in --lora_config"]),
        (LORA, {"rank": 8}, ["rank 4", "this run 8", "give 4 as lora_r in --lora_config"]),
        (BONE, {"rank": 16}, ["rank 8", "give 8 as --bone_r"]),
        (LORA, {"quant": "nf4"}, ["--quant none", "this run has --quant nf4; give --quant none"]),
        (replace(BONE, quant="int8"), {"quant": "none"}, ["give --quant int8"]),
        (PISSA, {"init": "init_pissa.pth"}, ["pissa_init init_pissa.pth", "leave it out"]),
        (PISSA, {"method": "lora"}, ["pissa adapter", "trains lora; give --peft pissa"]),
        (LORA, {"method": "bone", "mode": "bat-in"}, ["lora adapter", "trains bat-in; give --peft lora"]),
        (BONE, {"mode": "bat-in"}, ["trains bat-in; give --peft bone --bone_mode bone"]),
    ],
)
def test_an_own_file_of_other_settings_is_refused(base, tmp_path, config, now, words):
    adapter = Adapter(trained(base, replace(config, quant="none"))[1].tensors, AdapterMetadata.from_config(config))
    save_adapter(tmp_path / "adapter.safetensors", adapter.tensors, adapter.metadata)
    with pytest.raises(UserError) as error:
        start_adapter(replace(config, load=str(tmp_path / "adapter.safetensors"), **now), base_of(base))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_tensors_of_the_base_that_trained_along_train_along_again(base, tmp_path):
    adapter = trained(base, BONE)[1]
    whole = {"blocks.0.ln1.weight": torch.full((64,), 2.0), "blocks.1.att.time_decay": torch.zeros(1, 1, 64)}
    save_adapter(tmp_path / "adapter.safetensors", adapter.tensors | whole, adapter.metadata)
    load = replace(BONE, load=str(tmp_path / "adapter.safetensors"))
    with pytest.raises(UserError, match="holds 2 tensors of the base .* give --train_parts head ln time"):
        start_adapter(replace(load, train_parts=("head",)), base_of(base))
    assert whole.keys() < start_adapter(replace(load, train_parts=("time", "ln")), base_of(base)).tensors.keys()


@pytest.mark.parametrize("method", ["pissa", "lora-ga"])
def test_a_resumed_run_keeps_the_factors_that_it_began_with(base, tmp_path, method):
    """The factors depend on the machine, and lora-ga's also on the first batch."""
    torch.manual_seed(1)
    adapter = trained(base, PISSA)[1]
    tensors = {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in adapter.tensors.items()}
    config = replace(PISSA, method=method)
    save_adapter(tmp_path / "adapter.safetensors", tensors, AdapterMetadata.from_config(config))
    model = new_model(base)
    adapt(model, config, None, RWKV6_FAMILY, base_of(base), None, tmp_path)
    for name, layer in model.named_modules():
        if isinstance(layer, AdapterLinear):
            for key, tensor in tensors_of(layer).items():
                assert torch.equal(tensor, tensors[f"{name}.{key}"])
            taken = tensors[f"{name}.init_lora_B"] @ tensors[f"{name}.init_lora_A"]
            torch.testing.assert_close(layer.weight, base[f"{name}.weight"] - taken)
