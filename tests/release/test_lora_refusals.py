"""Adapters that no plain LoRA says, and folders that would hold two adapters, are refused."""

import pytest
import torch

from release.test_lora_form import random_adapter
from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.checkpoints.adapter_file import save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.release.convert import main


@pytest.mark.parametrize(
    "name, shape", [("lora_B", (64, 4)), ("init_lora_B", (64, 4)), ("lora_A", (8,)), ("lora_B", ())]
)
def test_factors_of_two_ranks_are_refused(tmp_path, tiny_state, name, shape):
    adapter = random_adapter(METHODS["pissa"], tiny_state())
    key = f"blocks.1.att.key.{name}"
    save_adapter(tmp_path / "a.safetensors", adapter.tensors | {key: torch.ones(shape)}, adapter.metadata)
    with pytest.raises(UserError, match=r"blocks.1.att.key holds .*(is due beside|no two matrices)"):
        main([str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--to", "lora"])


@pytest.mark.parametrize("variant", ["lora", "bat-in", "dora", "pissa"])
def test_a_change_beyond_float32_is_refused(tmp_path, tiny_state, variant):
    base = tiny_state()
    save_model(tmp_path / "base.pth", base)
    adapter = random_adapter(METHODS[variant], base)
    for key, tensor in adapter.tensors.items():
        if "init" not in key and "norm" not in key:
            tensor.fill_(3e38)
    save_adapter(tmp_path / "a.safetensors", adapter.tensors, adapter.metadata)
    words = [tmp_path / "a.safetensors", tmp_path / "out", "--to", "lora", "--base_model", tmp_path / "base.pth"]
    with pytest.raises(UserError, match="its change is too large for float32"):
        main(list(map(str, words)))
    assert not (tmp_path / "out").exists()


def test_a_run_s_folder_does_not_get_a_second_adapter(tmp_path, tiny_state):
    adapter = random_adapter(METHODS["lora"], tiny_state())
    run = tmp_path / "run"
    save_adapter(run / "adapter.safetensors", adapter.tensors, adapter.metadata)
    for output in (run, run / "lora", run / "a.pth"):
        with pytest.raises(UserError, match=f"the output {output} is inside the input {run}"):
            main([str(run), str(output), "--to", "lora"])
    assert [path.name for path in run.iterdir()] == ["adapter.safetensors"]
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UserError, match="is inside the input"):
        main([str(tmp_path / "link"), str(run / "lora"), "--to", "lora"])
    assert main([str(run), str(tmp_path / "lora"), "--to", "lora"]) == 0


def test_a_folder_with_two_adapters_is_refused_by_every_reader(tmp_path, tiny_state):
    adapter = random_adapter(METHODS["lora"], tiny_state())
    save_adapter(tmp_path / "a.safetensors", adapter.tensors, adapter.metadata)
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "run"), "--to", "lora"]) == 0
    (tmp_path / "a.safetensors").rename(tmp_path / "run" / "adapter.safetensors")
    words = "holds two adapters, adapter.safetensors of a run and adapter_config.json with that of peft"
    with pytest.raises(UserError, match=words):
        read_adapter(tmp_path / "run")
    with pytest.raises(UserError, match=words):
        main([str(tmp_path / "run"), str(tmp_path / "a.pth")])


def test_a_layer_with_another_method_s_tensor_is_refused(tmp_path, tiny_state):
    adapter = random_adapter(METHODS["bone-signed"], tiny_state())
    tensors = adapter.tensors | {"blocks.0.att.value.lora_A": torch.ones(8, 64)}
    save_adapter(tmp_path / "a.safetensors", tensors, adapter.metadata)
    with pytest.raises(UserError, match="att.value holds lora_A, and a bone-signed adapter has bone, bone_signs; the"):
        main([str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--to", "lora"])
