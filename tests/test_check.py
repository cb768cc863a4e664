"""The check tells a merged model that says what base plus adapter say from one that does not."""

import pytest
import torch

from rwkv_peft.adapters import inject
from rwkv_peft.check import Difference, adapter_config, main
from rwkv_peft.checkpoint import (Adapter, AdapterMetadata, load_base, model_config_from_state, read_adapter,
                                  save_adapter, save_model)
from rwkv_peft.config import AdapterConfig
from rwkv_peft.errors import UserError
from rwkv_peft.merge import merge_state_dict
from rwkv_peft.model import RWKV6

pytest.importorskip("rwkv")


def make_files(folder, state, **settings):
    """A base, an adapter of random values on it, and the two merged; the paths of the three files."""
    config = AdapterConfig(rank=8, **settings)
    model = RWKV6(model_config_from_state(state))
    model.load_state_dict(state)
    inject(model, config)
    torch.manual_seed(0)
    tensors = {name: 0.05 * torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    base, adapter, merged = folder / "base.pth", folder / "adapter.safetensors", folder / "merged.pth"
    save_model(base, state)
    save_adapter(adapter, tensors, AdapterMetadata.from_config(config))
    save_model(merged, merge_state_dict(load_base(base), [("adapter", read_adapter(adapter))]))
    return base, adapter, merged


def read_metadata(config):
    """An Adapter without tensors, as its file would describe it."""
    return Adapter({}, AdapterMetadata.from_config(config))


def check(base, adapter, merged):
    return main(["--base_model", str(base), "--bone_checkpoint", str(adapter), "--merged", str(merged)])


@pytest.mark.parametrize("mode", ["bat-in", "bat-out", "bone"])
def test_a_true_merge_passes(tmp_path, tiny_state, capsys, mode):
    assert check(*make_files(tmp_path, tiny_state(), mode=mode)) == 0
    assert "MORE THAN" not in capsys.readouterr().out


def test_the_unmerged_base_does_not_pass_for_the_merge(tmp_path, tiny_state, capsys):
    base, adapter, _ = make_files(tmp_path, tiny_state())
    assert check(base, adapter, base) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "MORE THAN" not in printed[0] and "MORE THAN" in printed[1]


def test_adapter_settings_come_back_from_metadata():
    config = AdapterConfig(method="lora", rank=4, alpha=8.0, targets=("att.key",), train_parts=("ln",))
    adapter = read_metadata(config)
    assert adapter_config(adapter) == config


def test_an_adapter_that_changes_the_base_is_refused():
    with pytest.raises(UserError, match="pissa"):
        adapter_config(read_metadata(AdapterConfig(method="pissa", rank=4)))


def test_difference_is_relative():
    reference = torch.tensor([[3.0, 4.0]])
    assert Difference.between(reference * 1.1, reference).relative == pytest.approx(0.1)
    assert Difference.between(reference, reference) == (0.0, 1.0)
