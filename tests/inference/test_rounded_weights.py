"""Weights in blocks of 8 or 4 bits: what a model computes with them, what is told, and what is refused."""

import re

import pytest
import torch

from inference.test_engine import adapter_file
from rwkv_peft.checkpoints.adapters import AdapterSource
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.inference import command
from rwkv_peft.inference.decode import generate
from rwkv_peft.inference.forward import prefill
from rwkv_peft.inference.loading import load_model
from rwkv_peft.inference.settings import Sampling
from rwkv_peft.inference.speakers import Speaker, adapter_speaker
from rwkv_peft.inference.weights import rounded
from rwkv_peft.ops.decode import quantize
from rwkv_peft.ops.decode.cpu import FAMILY

PROMPTS = [[66, 5, 9], [7], [30, 1, 50, 3, 4, 5, 70, 8, 9]]


@pytest.fixture
def path(tiny_state, tmp_path):
    save_model(tmp_path / "model.pth", tiny_state(seed=3))
    return tmp_path / "model.pth"


def logits(model):
    return prefill(model, PROMPTS)[0]


@pytest.mark.parametrize("bits", (8, 4))
def test_a_model_computes_with_the_rounded_matrices(path, tmp_path, monkeypatch, bits):
    told = []
    model, _ = load_model(path, weights=f"int{bits}", log=told.append)
    tensors = dict(open_base(path).tensors)
    names = [f"{name}.weight" for name in rounded(model)]
    assert len(names) == 17 and "head.weight" in names  # eight a layer
    for name in names:
        tensors[name] = quantize(tensors[name], bits).dequantized()
    save_model(tmp_path / "dequantized.pth", tensors)
    plain, _ = load_model(tmp_path / "dequantized.pth")
    due, given = logits(plain), logits(load_model(path)[0])
    assert (logits(model) - due).norm() < 0.02 * due.norm()  # activations are rounded, too
    steps = [list(generate(one, PROMPTS, Sampling(temperature=0), 5)) for one in (model, plain)]
    assert steps[0] == steps[1]
    monkeypatch.setattr(FAMILY, "unavailable", lambda: "no compiler")
    torch.testing.assert_close(logits(model), due, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(due, given, rtol=1e-3, atol=1e-3)
    assert re.fullmatch(rf"int{bits} blocks of 32: 0.3 -> 0.\d MB in 17 matrices", *told)


@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_kept_blocks_are_those_of_a_load_as_long_as_the_model_is_the_same(path, tiny_state, monkeypatch, kind):
    first, again = (load_model(path, weights=kind, keep=keep)[0] for keep in (True, False))
    kept = path.with_name(f"model.{kind}.safetensors")
    assert kept.exists() and torch.equal(logits(first), logits(again))
    with monkeypatch.context() as patched:
        patched.setattr("rwkv_peft.inference.weights.quantize", lambda *_: pytest.fail("rounded anew"))
        assert torch.equal(logits(load_model(path, weights=kind, keep=True)[0]), logits(first))
    save_model(path, tiny_state(seed=4))
    other = [logits(load_model(path, weights=kind, keep=keep)[0]) for keep in (True, False)]
    assert torch.equal(*other) and not torch.equal(other[0], logits(first))


def test_blocks_are_kept_of_a_model_by_itself(path):
    for flags in ([], ["--weights", "int8", "--adapter", "a.safetensors"]):
        with pytest.raises(UserError, match="--keep_weights keeps .*no --adapter"):
            command.main(["--model", str(path), "--prompt", "x", "--tokenizer", "bytes", "--keep_weights", *flags])


@pytest.mark.parametrize("settings", [{"mode": "bat-in"}, {"method": "lora", "alpha": 16.0, "train_parts": ("head",)}])
def test_a_voice_on_rounded_weights_has_its_own_of_what_the_adapter_changes(path, tmp_path, settings):
    adapter = AdapterSource(adapter_file(path, tmp_path / "adapter.safetensors", **settings))
    base = open_base(path)
    model, _ = load_model(path, weights="int8")
    before = logits(model)
    speaker = adapter_speaker("own", adapter, Speaker("base", model), base, False)
    merged, _ = load_model(path, [adapter], weights="int8")
    assert torch.equal(logits(speaker.model), logits(merged))
    assert torch.equal(logits(model), before) and not torch.equal(before, logits(merged))
    shared = [name for name, module in rounded(model).items() if rounded(speaker.model)[name] is module]
    assert shared == ([] if "train_parts" in settings else ["head"])


def test_the_command_tells_of_the_cast(model, capsys):
    assert command.main(["--model", str(model), "--prompt", "a", "--max_tokens", "2", "--weights", "int4"]) == 0
    assert "int4 blocks of 32: " in capsys.readouterr().err


def test_widths_that_are_no_blocks_are_refused(tiny_state, tmp_path):
    save_model(tmp_path / "odd.pth", tiny_state(dim_ffn=80))
    with pytest.raises(UserError, match=r"--weights int4: blocks\.0\.ffn\.value has rows of 80 .* leave the flag out"):
        load_model(tmp_path / "odd.pth", weights="int4")


def test_blocks_move_with_the_model_and_stay_what_they_are(path, tmp_path):
    """To memory without data, which a GPU's kernels are planned with."""
    model, _ = load_model(path, device="meta", precision="bf16", weights="int8")
    blocks = model.head.weight
    assert blocks.words.dtype == torch.int32 and blocks.words.is_meta and model.emb.weight.is_meta
    for rows in (1, 40):
        found, _ = model(torch.zeros(rows, 1, dtype=torch.long, device="meta"))
        assert found.dtype == torch.bfloat16 and found.shape == (rows, 1, model.config.vocab_size)
    adapter = AdapterSource(adapter_file(path, tmp_path / "adapter.safetensors", mode="bat-in"))
    speaker = adapter_speaker("own", adapter, Speaker("base", model), open_base(path), False)
    assert all(product.weight.words.is_meta for product in rounded(speaker.model).values())
