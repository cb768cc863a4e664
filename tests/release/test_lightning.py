"""Folders of rwkv_lightning_cuda: the change of a bone adapter, exactly both ways, and what its float16 loses."""

import hashlib
import json
import re

import pytest
import torch

from release.conversions import convert
from rwkv_peft.checkpoints.adapter_file import Adapter, AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named
from rwkv_peft.release.inspect import main as inspect
from rwkv_peft.release.merge import merged_tensors

RANK = 8
LAYERS = {"blocks.1.ffn.key": (192, 64), "blocks.0.att.key": (64, 64), "blocks.1.ffn.value": (64, 192)}


@pytest.fixture
def base(tmp_path):
    family = family_named("x070")
    config = family.new_dimensions(n_layer=2, n_embd=64, vocab_size=50, dim_ffn=192, head_size=32)
    torch.manual_seed(0)
    save_model(tmp_path / "base.pth", {key: torch.randn(shape) for key, shape in family.shapes(config).items()})
    return open_base(tmp_path / "base.pth")


@pytest.fixture
def adapter(base, tmp_path, dtype):
    """A bone adapter, saved as adapter.safetensors."""
    torch.manual_seed(1)
    tensors = {f"{module}.bone": torch.randn(RANK, out).to(dtype) for module, (out, _) in LAYERS.items()}
    told = AdapterMetadata("bone", RANK, targets=("ffn.key",), base_fingerprint=base.fingerprint, generation="x070")
    save_adapter(tmp_path / "adapter.safetensors", tensors, told)
    return Adapter(tensors, told)


def written(tmp_path, capsys):
    base = ("--base_model", tmp_path / "base.pth")
    convert(tmp_path / "adapter.safetensors", tmp_path / "out", "--to", "lightning", *base)
    manifest = json.loads((tmp_path / "out" / "adapter.json").read_text())
    return manifest, torch.load(tmp_path / "out" / "adapter.pth", weights_only=True), capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_folder_computes_what_the_adapter_does(base, adapter, dtype, tmp_path, capsys):
    manifest, tensors, said = written(tmp_path, capsys)
    assert list(tensors) == [target["name"] for target in manifest["targets"]]
    assert [target["layer"] for target in manifest["targets"]] == [0, 1, 1] and manifest["rank"] == RANK
    assert manifest["base_fingerprint"] == hashlib.sha256((tmp_path / "base.pth").read_bytes()).hexdigest()
    for target in manifest["targets"]:
        module, D = target["name"].removesuffix(".weight.D"), tensors[target["name"]]
        out, width = LAYERS[module]
        assert (target["in_features"], target["shape"]) == (width, [out, RANK])
        assert f"blocks.{target['layer']}.{target['target']}.D" == target["name"]
        x = torch.randn(3, width, dtype=torch.float64)
        sums = torch.stack([x[:, torch.arange(width) % RANK == j].sum(1) for j in range(RANK)], 1)
        weight, params = base.tensors[f"{module}.weight"].double(), adapter.modules()[module]
        change = adapter.metadata.method.change.delta(weight, params, 1.0).double()
        torch.testing.assert_close(manifest["scale"] * sums @ D.double().T, x @ change.T, rtol=0, atol=0.02)
    content = {name: value for name, value in manifest.items() if name != "content_version"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    for tensor in tensors.values():
        digest.update(tensor.view(torch.uint16).numpy().tobytes())
    assert manifest["content_version"] == digest.hexdigest()
    assert manifest["dtype"] == ("bfloat16" if dtype is torch.bfloat16 else "float16")
    lost = re.search(r"MiSS of 3 layers, (exactly|of which the runtime's float16 loses (.*)); rwkv_lightning", said)[2]
    assert lost is None if dtype is not torch.float32 else 1e-4 < float(lost) < 3e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_what_float16_loses_of_bfloat16_is_told(base, adapter, dtype, tmp_path, capsys):
    small = {key: 1e-6 * tensor for key, tensor in adapter.tensors.items()}
    save_adapter(tmp_path / "adapter.safetensors", small, adapter.metadata)
    manifest, tensors, said = written(tmp_path, capsys)
    assert manifest["dtype"] == "bfloat16" and "float16 loses " in said
    assert torch.equal(tensors["blocks.0.att.key.weight.D"].T, small["blocks.0.att.key.bone"])


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_a_folder_is_an_adapter_everywhere(base, adapter, tmp_path, capsys):
    written(tmp_path, capsys)
    found = read_adapter(tmp_path / "out")
    assert {key: tensor.tolist() for key, tensor in found.tensors.items()} == {
        key: tensor.tolist() for key, tensor in adapter.tensors.items()
    }
    assert (found.metadata.variant, found.metadata.rank, found.metadata.generation) == ("bone", RANK, "x070")
    assert inspect([str(tmp_path / "out")]) == 0 and "bone" in capsys.readouterr().out
    convert(tmp_path / "out", tmp_path / "back.safetensors")
    merged = merged_tensors(base, [("a", adapter)])
    for path in (tmp_path / "out", tmp_path / "back.safetensors"):
        again = merged_tensors(base, [(path, read_adapter(path))])
        assert all(torch.equal(again[key], merged[key]) for key in merged)
    manifest = json.loads((tmp_path / "out" / "adapter.json").read_text())
    (tmp_path / "out" / "adapter.json").write_text(json.dumps(manifest | {"scale": 0.5, "alpha": 4}))
    halved = read_adapter(tmp_path / "out").tensors
    assert all(torch.equal(halved[key], adapter.tensors[key].float() / 2) for key in halved)


@pytest.mark.parametrize("dtype", [torch.float32], ids=str)
def test_what_is_no_such_adapter_is_told(base, adapter, tmp_path, capsys, tiny_state):
    written(tmp_path, capsys)
    manifest = json.loads((tmp_path / "out" / "adapter.json").read_text())
    for change, words in (
        ({"method": "lora"}, "method is 'lora', and 'miss' is read here"),
        ({"format_version": 2}, "format_version is 2"),
        ({"scale": 0}, "scale = 0, and two finite numbers other than 0 are due"),
        ({"scale": 10**400}, "two finite numbers other than 0 are due"),
        ({"rank": 4}, "do not fit together: not all are D of rank 4"),
        ({"targets": manifest["targets"][1:]}, "do not fit together: blocks.0.att.key.weight.D"),
        ({"targets": None}, "do not fit together"),
    ):
        (tmp_path / "out" / "adapter.json").write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=words):
            read_adapter(tmp_path / "out")
    save_model(tmp_path / "six.pth", tiny_state())
    big = {key: 1e5 * tensor for key, tensor in adapter.tensors.items()}
    save_adapter(tmp_path / "big.safetensors", big, adapter.metadata)
    blocks = {f"{module}.bone": torch.ones(width // RANK, RANK, RANK) for module, (_, width) in LAYERS.items()}
    save_adapter(tmp_path / "bat.safetensors", blocks, AdapterMetadata("bat-in", RANK, generation="x070"))
    unnamed = AdapterMetadata("bone", RANK)
    save_adapter(tmp_path / "unnamed.safetensors", adapter.tensors, unnamed)
    for name, model, target, words in (
        ("adapter", None, "new", "records the base's file, by its SHA-256; give it as --base_model"),
        ("adapter", "base.pth", "new.pth", "writes a folder, and new.pth|names a .pth file"),
        ("bat", "base.pth", "new", "serves MiSS, which is bone, and this is bat-in; merge it"),
        ("unnamed", "six.pth", "new", "serves RWKV-7, and .* is RWKV-6"),
        ("big", "base.pth", "new", "values beyond 65504"),
    ):
        given = ["--base_model", tmp_path / model] if model else []
        with pytest.raises(UserError, match=words):
            convert(tmp_path / f"{name}.safetensors", tmp_path / target, "--to", "lightning", *given)
        assert not (tmp_path / "new").exists() and not (tmp_path / "new.pth").exists()
