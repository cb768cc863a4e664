"""Adapters as plain LoRA: the same change, exactly or with the reported error, also in the tools that read it."""

import os
import re
from pathlib import Path

import pytest
import torch

from rwkv_peft.adapters.methods import METHODS
from rwkv_peft.checkpoints.adapter_file import Adapter, AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.adapter_folders import read_hf_folder
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import family_named
from rwkv_peft.release.convert import main
from rwkv_peft.release.lora import lora_form

RANK, MINI, SCALE = 8, 4, 1.5
EXACT = ("bone", "bone-mini", "bone-signed", "lora", "lora-plus", "rslora", "pissa", "olora", "lora-ga")
LAYERS = {"blocks.0.ffn.key": (96, 64), "blocks.1.ffn.value": (64, 96), "blocks.1.att.key": (64, 64)}


def random_adapter(method, base, fingerprint=""):
    """An Adapter of a method on LAYERS."""
    torch.manual_seed(1)
    config = AdapterConfig(rank=RANK, mini_rank=MINI)
    tensors = {}
    for module, (out_features, in_features) in LAYERS.items():
        constants = {}
        if method.held is not None:
            gradient = torch.randn(out_features, in_features)
            constants = method.held.make(base[f"{module}.weight"].float(), config, gradient)
        for name, shape in method.tensors.shapes(config, out_features, in_features).items():
            tensors[f"{module}.{name}"] = constants[name] if name in constants else 0.1 * torch.randn(shape)
    scale = SCALE if method.alpha else 1.0
    settings = {name: getattr(config, name) for name in method.tensors.size}
    settings |= {"scale": scale, "base_fingerprint": fingerprint}
    return Adapter(tensors, AdapterMetadata(method.file_name, targets=("ffn.key", "ffn.value", "att.key"), **settings))


def changes(adapter, base):
    """{module: W' - W} of an adapter, float64."""
    method, scale = adapter.metadata.method, adapter.metadata.scale
    return {
        module: method.change.delta(base[f"{module}.weight"].double(), params, scale)
        for module, params in adapter.modules().items()
    }


def far(left, right):
    return max(float((left[key] - right[key]).norm() / right[key].norm()) for key in right)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_the_lora_of_a_method_is_its_change(method, tiny_state):
    base = tiny_state()
    adapter = random_adapter(method, base)
    form, errors = lora_form(adapter, base)
    assert bool(errors) == (method.name not in EXACT)
    if method.name in EXACT:
        assert far(changes(form, base), changes(adapter, base)) < 1e-5
        return
    assert form.metadata.rank == 2 * RANK
    assert far(changes(form, base), changes(adapter, base)) == pytest.approx(max(errors.values()), rel=1e-3)
    whole, _ = lora_form(adapter, base, rank=64)
    assert far(changes(whole, base), changes(adapter, base)) < 1e-4


def test_the_error_of_a_truncation_is_that_of_the_singular_values_left_out(tiny_state):
    base = tiny_state()
    adapter = random_adapter(METHODS["bat-in"], base)
    for module, change in changes(adapter, base).items():
        values = torch.linalg.svdvals(change)
        best = float(values[16:].norm() / values.norm())
        assert lora_form(adapter, base, rank=16)[1][module] == pytest.approx(best, rel=1e-2)


@pytest.fixture
def files(tmp_path, tiny_state):
    """Paths of a model, of bone and of bat-in on it, and the Base."""
    state = tiny_state(vocab_size=257)
    base = base_of(state)
    save_model(tmp_path / "base.pth", state)
    for name in ("bone", "bat-in"):
        adapter = random_adapter(METHODS[name], state, base.fingerprint)
        save_adapter(tmp_path / f"{name}.safetensors", adapter.tensors, adapter.metadata)
    return tmp_path, base


def convert(folder, source, target, *more):
    words = (folder / source, folder / target, "--to", "lora", "--base_model", folder / "base.pth", *more)
    assert main([str(word) for word in words]) == 0


def test_an_interrupt_leaves_no_folder_and_no_mixture_of_two(files, monkeypatch):
    folder, _ = files
    before = os.listdir(folder)
    rename = os.replace

    def killed(source, target):
        if os.path.basename(target) == "adapter_config.json":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
        convert(folder, "bone.safetensors", "lora")
    assert os.listdir(folder) == before
    convert(folder, "bone.safetensors", "lora")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        convert(folder, "bat-in.safetensors", "lora")
    with pytest.raises(UserError, match="has no adapter_config.json"):
        read_hf_folder(folder / "lora")
    convert(folder, "bat-in.safetensors", "lora")
    assert read_adapter(folder / "lora").metadata.rank == 2 * RANK


def merged(base, adapter):
    """{key: tensor} of the base with an adapter's change."""
    state = dict(base.tensors)
    for module, change in changes(adapter, base.tensors).items():
        state[f"{module}.weight"] = state[f"{module}.weight"] + change.float()
    return state


@pytest.mark.parametrize("target", ["folder", "a.pth", "b.safetensors"])
def test_what_is_written_is_read_as_the_same_change(files, target, capsys):
    folder, base = files
    convert(folder, "bone.safetensors", target)
    assert "LoRA of rank 8 of 3 layers, the same change, exactly" in capsys.readouterr().out
    told = {"alpha": 8.0} if target.endswith(".pth") else {}
    back = read_adapter(folder / target, **told)
    expected = changes(read_adapter(folder / "bone.safetensors"), base.tensors)
    assert far(changes(back, base.tensors), expected) < 1e-6


def test_the_folder_of_a_run_stands_for_what_it_trained(files):
    folder, _ = files
    products = (("adapted", "bone.safetensors", "adapter.safetensors"), ("full", "base.pth", "rwkv.pth"))
    for run, file, product in products:
        (folder / run).mkdir()
        (folder / run / product).write_bytes((folder / file).read_bytes())
    for source, target in (("bone.safetensors", "a.safetensors"), ("adapted", "b.safetensors")):
        convert(folder, source, target)
    assert (folder / "a.safetensors").read_bytes() == (folder / "b.safetensors").read_bytes()
    for source, target in (("base.pth", "a.st"), ("full", "b.st")):
        assert main([str(folder / source), str(folder / target)]) == 0
    assert (folder / "a.st").read_bytes() == (folder / "b.st").read_bytes()


def test_the_error_of_bat_in_is_told(files, capsys):
    folder, base = files
    convert(folder, "bat-in.safetensors", "folder", "--lora_rank", 24)
    share = float(re.search(r"without ([\d.]+)% of the change", capsys.readouterr().out)[1])
    adapter = read_adapter(folder / "bat-in.safetensors")
    worst = far(changes(read_adapter(folder / "folder"), base.tensors), changes(adapter, base.tensors))
    assert 0 < share <= 100 * worst + 0.1


def test_peft_loads_the_folder(files):
    peft = pytest.importorskip("peft")
    folder, base = files
    convert(folder, "bone.safetensors", "folder")
    family = family_named(base.config.version)
    expected = family.load(merged(base, read_adapter(folder / "bone.safetensors")), base.config)
    model = peft.PeftModel.from_pretrained(family.load(base.tensors, base.config), folder / "folder")
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], expected(tokens)[0], rtol=1e-4, atol=1e-4)
        assert (model(tokens)[0] - family.load(base.tensors, base.config)(tokens)[0]).abs().max() > 0.1


def test_a_gguf_names_layers_as_llama_cpp_does(files):
    gguf = pytest.importorskip("gguf")
    folder, _ = files
    convert(folder, "bone.safetensors", "lora.gguf")
    reader = gguf.GGUFReader(folder / "lora.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layers = ("0.channel_mix_key", "1.channel_mix_value", "1.time_mix_key")
    assert set(tensors) == {f"blk.{layer}.weight.lora_{part}" for layer in layers for part in "ab"}
    bone = read_adapter(folder / "bone.safetensors").tensors["blocks.0.ffn.key.bone"]
    assert torch.equal(torch.from_numpy(tensors["blk.0.channel_mix_key.weight.lora_b"].data.copy()), bone.t())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert (fields["general.architecture"], fields["adapter.lora.alpha"]) == ("rwkv6", 8.0)


def log_probabilities(path, lora=None):
    """llama.cpp's log-probabilities of the token after a few others, with or without a LoRA."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 256, 1, -1, False
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        params.lora_adapters = [adapter]
    words = {"prompt": list(range(5, 40)), "n_predict": 1, "n_probs": 257, "temperature": 0.0, "cache_prompt": False}
    answer = xllamacpp.Server(params).handle_completions(words)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return torch.tensor([entry["logprob"] for entry in sorted(found, key=lambda entry: entry["id"])])


def check_llama_cpp(folder, base):
    """llama.cpp computes the merged model, given base.pth and the LoRA of bone.safetensors beside it."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    save_model(folder / "merged.pth", merged(base, read_adapter(folder / "bone.safetensors")))
    for name in ("base", "merged"):
        main([str(folder / f"{name}.pth"), str(folder / f"{name}.gguf"), "--gguf_type", "f32"])
    convert(folder, "bone.safetensors", "lora.gguf")
    plain, expected = log_probabilities(folder / "base.gguf"), log_probabilities(folder / "merged.gguf")
    with_lora = log_probabilities(folder / "base.gguf", folder / "lora.gguf")
    torch.testing.assert_close(with_lora, expected, rtol=0, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1


def test_llama_cpp_takes_the_lora_of_every_layer_of_an_rwkv7(tmp_path):
    tensors = open_base(Path(__file__).resolve().parents[2] / "demo" / "rwkv7-demo.pth").tensors
    base = base_of({key: tensor.float() for key, tensor in tensors.items()})
    save_model(tmp_path / "base.pth", base.tensors)
    torch.manual_seed(0)
    layers = [f"blocks.{i}.{target}" for i in range(base.config.n_layer) for target in base.family.targets]
    bones = {f"{name}.bone": 0.05 * torch.randn(RANK, base.tensors[f"{name}.weight"].shape[0]) for name in layers}
    adapter = Adapter(bones, AdapterMetadata("bone", rank=RANK, targets=base.family.targets))
    save_adapter(tmp_path / "bone.safetensors", adapter.tensors, adapter.metadata)
    check_llama_cpp(tmp_path, base)


@pytest.mark.parametrize(
    "words, message",
    [
        (("bone.safetensors", "x", "--to", "lora"), "bone as LoRA depends on the layers' weights; give --base_model"),
        (("bone.safetensors", "x.st", "--to", "lora", "--base_model", "base.pth"), "x.st cannot hold: name a .pth"),
        (("base.pth", "x", "--to", "lora"), "base.pth holds no adapter"),
        (("bone.safetensors", "x", "--to", "lora", "--base_model", "base.pth", "--lora_rank", "4"), "which is exact"),
        (
            ("bat-in.safetensors", "x", "--to", "lora", "--base_model", "base.pth", "--lora_rank", "65"),
            "of rank 65 is more than the weight (96, 64) of blocks.0.ffn.key allows; give --lora_rank, at most 64",
        ),
        (
            ("wide.safetensors", "x", "--to", "lora", "--base_model", "base.pth"),
            "of rank 128 is more than the weight (64, 64) of blocks.0.att.key allows; give --lora_rank, at most 64",
        ),
        (("bone.safetensors", "x", "--to", "lora", "--base_model", "other.pth"), "was trained on another base"),
        (("bone.safetensors", "x.safetensors", "--lora_rank", "4"), "add --to lora"),
        (("whole.safetensors", "x", "--to", "lora", "--base_model", "base.pth"), "1 tensors of the base trained along"),
    ],
)
def test_what_has_no_such_form_is_refused(files, words, message, tiny_state):
    folder, base = files
    save_model(folder / "other.pth", tiny_state(vocab_size=257, seed=3))
    adapter = read_adapter(folder / "bone.safetensors")
    key = "blocks.0.ln1.weight"
    save_adapter(folder / "whole.safetensors", adapter.tensors | {key: base.tensors[key]}, adapter.metadata)
    wide = AdapterMetadata("bat-in", rank=64, targets=("att.key",))
    save_adapter(folder / "wide.safetensors", {"blocks.0.att.key.bone": torch.ones(1, 64, 64)}, wide)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=re.escape(message)):
        main([str(folder / word) if "." in word or word == "x" else word for word in words])
    assert sorted(folder.iterdir()) == before


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
