"""Adapters that are written for rwkv_lightning_cuda: the digests that its loader compares, and what it does not serve.
That its files are read is in test_merge_foreign.py."""

import hashlib
import zipfile

import pytest
import torch

from release.merges import RANK, adapter_of, convert, same
from rwkv_peft.checkpoints.adapter_file import save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models.rwkv7.keys import new_dimensions, shapes


@pytest.fixture
def base(tmp_path):
    """{key: tensor} of a random RWKV-7, also in base.pth."""
    config = new_dimensions(n_layer=2, n_embd=32, vocab_size=40, head_size=8, dim_ffn=48)
    tensors = {key: torch.randn(shape) for key, shape in shapes(config).items()}
    save_model(tmp_path / "base.pth", tensors)
    return tensors


def test_a_written_file_has_the_digests_that_the_loader_compares(base, tmp_path):
    """jsoncpp's text of the manifest is spelled out; D's bytes follow in its order."""
    tensors, metadata = adapter_of("bone", base, ("att.key",))
    adapter = {key: tensor.bfloat16() for key, tensor in tensors.items()}  # (rank, out)
    save_adapter(tmp_path / "a.safetensors", adapter, metadata)
    output = tmp_path / "adapter-final.pth"
    convert(tmp_path / "a.safetensors", output, "--to", "lightning", "--base_model", tmp_path / "base.pth")
    factors = {key.replace(".bone", ".weight.D"): tensor.T.contiguous() for key, tensor in adapter.items()}
    fingerprint = hashlib.sha256((tmp_path / "base.pth").read_bytes()).hexdigest()
    before = f'{{"alpha":{RANK},"base_fingerprint":"{fingerprint}",'
    targets = ",".join(
        f'{{"in_features":32,"layer":{i},"name":"blocks.{i}.att.key.weight.D","shape":[32,8],"target":"att.key.weight"}}'
        for i in range(2)
    )
    after = (
        '"dtype":"bfloat16","format_version":1,"kind":"inference_adapter","layout":"modulo_rank_zero_pad",'
        f'"method":"miss","rank":{RANK},"scale":1,"targets":[{targets}]}}'
    )
    content = b"".join(factor.view(torch.uint8).numpy().tobytes() for factor in factors.values())
    version = hashlib.sha256((before + after).encode() + content).hexdigest()
    with zipfile.ZipFile(output) as archive:
        assert archive.read("archive/miss.json").decode() == before + f'"content_version":"{version}",' + after
        assert all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
    assert same(torch.load(output), factors) and same(read_adapter(output).tensors, adapter)


@pytest.mark.parametrize(
    "name, output, message",
    [
        ("bone", "x.safetensors", "a name that ends in .pth"),
        ("large", "x.pth", "holds values beyond float16"),
        ("emb", "x.pth", "and this is of rank 8 and adapts emb of an RWKV-7"),
        ("bat-in", "x.pth", "serves bone .* and this adapter is bat-in"),
        ("whole", "x.pth", "with 1 tensors trained whole"),
    ],
)
def test_what_is_not_served_is_refused(base, tmp_path, name, output, message):
    tensors, metadata = adapter_of(
        name if name == "bat-in" else "bone", base, ("emb",) if name == "emb" else ("att.key",)
    )
    if name == "large":
        tensors["blocks.0.att.key.bone"][0, 0] = 7e4
    if name == "whole":
        tensors["blocks.0.ln1.weight"] = base["blocks.0.ln1.weight"] + 1
    save_adapter(tmp_path / "a.safetensors", tensors, metadata)
    words = (tmp_path / "a.safetensors", tmp_path / output, "--to", "lightning")
    with pytest.raises(UserError, match=message):
        convert(*words, "--base_model", tmp_path / "base.pth")
    with pytest.raises(UserError, match="names its base's file by digest: give --base_model"):
        convert(*words)
    assert not (tmp_path / output).exists()
