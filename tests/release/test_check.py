"""The check passes a merged model that computes what base plus adapter compute, and fails any other."""

from dataclasses import replace

import pytest
import torch

from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import adapter_parameter
from rwkv_peft.checkpoints.adapter_file import Adapter, AdapterMetadata, Origin, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv6.model import RWKV6
from rwkv_peft.release import merge as merge_cli
from rwkv_peft.release.check import SHOWN, adapted_logits, main, package_logits
from rwkv_peft.release.merge import merged_tensors
from rwkv_peft.release.runtimes import reference_logits
from tools.plan.rehearsal import Tracker

pytest.importorskip("rwkv")


def make_files(folder, state, size=0.05, **settings):
    """Write a base, an adapter with random values of a given size, and the two merged -> the paths of the three."""
    config = AdapterConfig(rank=8, **settings)
    model = RWKV6(base_of(state).config)
    model.load_state_dict(state)
    inject(model, config, family=family_named("x060"))
    torch.manual_seed(0)
    tensors = {name: size * torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {name: buffer for name, buffer in model.named_buffers() if adapter_parameter(name)}
    base, adapter, merged = folder / "base.pth", folder / "adapter.safetensors", folder / "merged.pth"
    save_model(base, state)
    save_adapter(adapter, tensors, AdapterMetadata.from_config(config))
    save_model(merged, merged_tensors(open_base(base), [("adapter", read_adapter(adapter))]))
    return base, adapter, merged


def check(base, adapter, merged, *flags):
    return main(f"--base_model {base} --bone_checkpoint {adapter} --merged {merged}".split() + [*flags])


def merge(base, adapter, merged, *flags):
    assert merge_cli.main(f"--base_model {base} --bone_checkpoint {adapter} --output {merged}".split() + [*flags]) == 0


@pytest.mark.parametrize("mode", ["bat-in", "bat-out", "bone"])
def test_a_true_merge_passes(tmp_path, tiny_state, capsys, mode):
    assert check(*make_files(tmp_path, tiny_state(), mode=mode)) == 0
    assert "MORE THAN" not in capsys.readouterr().out


def test_a_merge_and_the_runtimes_are_checked_by_one_command(tmp_path, tiny_state, capsys):
    files = make_files(tmp_path, tiny_state())
    assert check(*files, "--runtimes", "--gguf_types") == 0
    printed = capsys.readouterr().out
    assert "each as base and adapter make it\n" in printed and "\n| rwkv, sequence " in printed
    assert "keys, order, shapes" not in printed  # of which a merge to another dtype has others
    assert check(files[0], files[1], files[0], "--runtimes", "--gguf_types") == 1  # the runtimes agree on the base


def test_the_unmerged_base_does_not_pass_for_the_merge(tmp_path, tiny_state, capsys):
    base, adapter, _ = make_files(tmp_path, tiny_state())
    assert check(base, adapter, base) == 1
    printed = capsys.readouterr().out.splitlines()
    assert "MORE THAN" not in printed[0] and "MORE THAN" in printed[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_that_changes_little_is_looked_for_all_the_same(tmp_path, tiny_state, capsys, dtype):
    """The base's logits are then as near to those of the merge as a rounding to bfloat16."""
    base, adapter, merged = make_files(tmp_path, tiny_state(dtype=dtype), size=1e-4)
    assert check(base, adapter, merged) == 0
    assert "MORE THAN" not in capsys.readouterr().out
    assert check(base, adapter, base) == 1
    printed = capsys.readouterr().out
    assert "MORE THAN" not in printed and printed.count("DIFFERS") == SHOWN and "and 6 more differences\n" in printed
    assert printed.count(", as the base has it\n") == SHOWN
    key = "blocks.0.att.key.weight"
    half = dict(open_base(merged).tensors) | {key: open_base(base).tensors[key]}
    save_model(tmp_path / "half.pth", half)
    assert check(base, adapter, tmp_path / "half.pth") == 1
    assert f"\nDIFFERS  {key}: " in (printed := capsys.readouterr().out) and printed.count("DIFFERS") == 1


def test_an_adapter_of_a_quantized_base_may_be_merged_into_the_original(tmp_path, tiny_state, capsys):
    pytest.importorskip("bitsandbytes")
    base, adapter, merged = make_files(tmp_path, tiny_state(), quant="int8")
    merge(base, adapter, merged, "--quant", "none")
    assert check(base, adapter, merged) == 0 and "MORE THAN" not in capsys.readouterr().out


def test_logits_that_are_not_finite_do_not_pass(tmp_path, tiny_state):
    base, adapter, merged = make_files(tmp_path, tiny_state())
    state = open_base(merged).tensors
    save_model(merged, state | {"blocks.0.ffn.key.weight": 1e38 * state["blocks.0.ffn.key.weight"]})
    assert check(base, adapter, merged) == 1


def test_adapter_settings_come_back_from_metadata():
    config = AdapterConfig(method="lora", rank=4, alpha=8.0, targets=("att.key",), train_parts=("ln",))
    adapter = Adapter({}, AdapterMetadata.from_config(config))
    assert adapter.config(family_named("x060")) == config


@pytest.mark.parametrize(
    "tensors, flags",
    [
        ({"blocks.0.att.key.bone": torch.randn(8, 8, 8)}, ["--bone_mode", "bat"]),
        (
            {"blocks.0.att.key.lora_A": torch.randn(8, 64), "blocks.0.att.key.lora_B": torch.randn(64, 8)},
            ["--lora_alpha", "8"],
        ),
        ({"blocks.0.att.key.disha": torch.randn(8, 8, 8), "blocks.0.ln1.weight": torch.randn(64)}, []),
        ({"blocks.0.ln1.weight": torch.randn(64)}, []),
    ],
)
def test_files_of_rwkv_peft_are_compared(tmp_path, tiny_state, tensors, flags):
    base, adapter, merged = tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "merged.pth"
    save_model(base, tiny_state())
    blocks = {key.replace("blocks.0", f"blocks.{n}"): 0.05 * t for key, t in tensors.items() for n in range(2)}
    torch.save(blocks, adapter)
    merge(base, adapter, merged, *flags)
    assert check(base, adapter, merged, *flags) == 0
    if flags:
        with pytest.raises(UserError, match=f"give {flags[0]}"):
            check(base, adapter, merged)


def test_an_adapter_of_another_base_is_refused(tmp_path, tiny_state):
    """With the merge's words, and accepted if the merge would accept it."""
    base, adapter, merged = make_files(tmp_path, tiny_state())
    mine = read_adapter(adapter)
    save_adapter(adapter, mine.tensors, replace(mine.metadata, base_fingerprint="0" * 32, origin=Origin("base-7b.pth")))
    words = f"{adapter} was trained on another base: base-7b.pth, fingerprint {'0' * 32}; {base} has "
    with pytest.raises(UserError, match=words):
        check(base, adapter, merged)
    assert check(base, adapter, merged, "--any_base") == 0


def test_an_adapter_that_does_not_fit_is_refused_by_its_name(tmp_path, tiny_state):
    """Also if the base is rebuilt for it, as for PiSSA."""
    base, adapter, merged = make_files(tmp_path, tiny_state(), method="pissa", targets=("att.key",))
    mine = read_adapter(adapter)
    states = {f"blocks.{n}.att.time_state": torch.ones(1, 2, 3) for n in range(2)}
    opened, tokens = open_base(base), torch.tensor([1])
    with pytest.raises(UserError, match="^mine: blocks.0.att.time_state"):
        adapted_logits(opened, Adapter(mine.tensors | states, mine.metadata), "mine", tokens, {})
    save_adapter(adapter, {key.replace("blocks.0", "blocks.9"): t for key, t in mine.tensors.items()}, mine.metadata)
    with pytest.raises(UserError, match=f"^{adapter}: .* there is no blocks.9.att.key.weight"):
        check(base, adapter, merged)


def test_a_model_of_other_dimensions_is_refused(tmp_path, tiny_state):
    base, adapter, _ = make_files(tmp_path, tiny_state())
    save_model(tmp_path / "other.pth", tiny_state(vocab_size=300))
    with pytest.raises(UserError, match="differ in their dimensions"):
        check(base, adapter, tmp_path / "other.pth")


def test_a_merged_model_starts_from_its_time_states(tmp_path, tiny_state, capsys):
    base, adapter, merged = make_files(tmp_path, tiny_state())
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}
    save_model(tmp_path / "tuned.pth", open_base(merged).tensors | states)
    assert check(base, adapter, tmp_path / "tuned.pth") == 0
    assert ", which neither the base nor the adapter holds\n" in capsys.readouterr().out
    torch.save(states, tmp_path / "states.pth")
    merge(base, f"{adapter} {tmp_path}/states.pth", tmp_path / "both.pth", "--any_base")
    assert check(base, adapter, tmp_path / "both.pth") == 0
    capsys.readouterr()
    save_model(tmp_path / "alone.pth", open_base(base).tensors | states)
    assert check(base, tmp_path / "states.pth", tmp_path / "alone.pth") == 0
    assert "neither" not in capsys.readouterr().out


@pytest.mark.parametrize("head", ["tied", "replaced"])
def test_a_head_that_the_adapter_does_not_explain_is_named(tmp_path, tiny_state, capsys, head):
    base, adapter, merged = make_files(tmp_path, tiny_state())
    state = dict(open_base(merged).tensors)
    state["head.weight"] = state["emb.weight"] if head == "tied" else torch.randn(80, 64)
    torch.save(state, tmp_path / "other.pth")  # which keeps the storage that two tensors share
    assert check(base, adapter, tmp_path / "other.pth") == 1
    assert "\nDIFFERS  head.weight: 5,120 of 5,120 values" in (out := capsys.readouterr().out)
    assert out.count("DIFFERS") == 1


def test_a_runtime_that_fails_is_told_in_words(tmp_path, tiny_state, monkeypatch):
    def broken(path, tokens, config):
        raise RuntimeError("no such instruction\nat all")

    monkeypatch.setattr("rwkv_peft.release.check.rwkv_sequence", broken)
    with pytest.raises(UserError, match="cannot compute .*RuntimeError: no such instruction"):
        check(*make_files(tmp_path, tiny_state()))


def test_an_adapter_on_a_base_that_was_quantized_or_changed_is_compared_on_that(tmp_path, tiny_state, capsys):
    pytest.importorskip("bitsandbytes")
    quantized, changed = ({"quant": "nf4", "mode": "bat-in-scaled"}, {"quant": "int8"}), ("pissa", "olora")
    for settings in (*quantized, *({"method": method} for method in changed)):
        state = tiny_state(dtype=torch.float16)
        model = RWKV6(base_of(state).config)
        model.load_state_dict(state)
        model.bfloat16()
        config = AdapterConfig(**{"rank": 8} | settings)
        inject(model, config, family=family_named("x060"))
        trained = dict(model.named_parameters()) | dict(model.named_buffers())
        own = {name: tensor for name, tensor in trained.items() if adapter_parameter(name)}
        tensors = {name: t + 0.02 * torch.randn_like(t) * ("init" not in name) for name, t in own.items()}
        base, adapter, merged = tmp_path / "base.pth", tmp_path / "adapter.safetensors", tmp_path / "merged.pth"
        save_model(base, state)
        save_adapter(adapter, tensors, AdapterMetadata.from_config(config, precision="bf16"))
        merge(base, adapter, merged, "--output_dtype", "fp32")
        assert check(base, adapter, merged) == 0
        printed = capsys.readouterr().out
        assert ("onto the base quantized" in printed) == ("quant" in settings)
        assert float(printed.split("adapter on: relative difference ")[1].split(",")[0]) < 1e-5, settings


class InMemory(Tracker):
    """Counts no tensors without data, which a model has until its weights are loaded."""

    def _count(self, storage):
        if storage.device.type == "cpu":
            super()._count(storage)


@pytest.mark.parametrize("settings", [{"mode": "bat-in"}, {"quant": "int8"}, {"method": "pissa"}], ids=str)
def test_one_block_at_a_time_becomes_float32(tmp_path, tiny_state, settings):
    """The most bytes beside the files are fewer than a second copy of the model has, in its file's 16 bits."""
    if "quant" in settings:
        pytest.importorskip("bitsandbytes")
    base, adapter, merged = make_files(tmp_path, tiny_state(n_layer=12, dtype=torch.bfloat16), **settings)
    opened, whole, held = open_base(base), open_base(merged), read_adapter(adapter)
    tokens = torch.arange(4)
    for compute in (
        lambda: adapted_logits(opened, held, "adapter", tokens, {}),
        lambda: reference_logits(whole, tokens, torch.float32),
    ):
        with InMemory() as tracker:
            tracker.ignore([*opened.tensors.values(), *whole.tensors.values(), *held.tensors.values()])
            compute()
        assert 0 < tracker.peak < sum(tensor.nbytes for tensor in opened.tensors.values())


def test_the_package_reads_no_more_embeddings_than_tokens(tmp_path, tiny_state, monkeypatch):
    """And only what it computes with in the file's dtype is float32."""
    base = open_base(make_files(tmp_path, tiny_state(dtype=torch.bfloat16))[0])

    def read(path, tokens, config):
        tensors = torch.load(path, weights_only=True)
        assert torch.equal(tensors["emb.weight"][tokens], base.tensors["emb.weight"][[3, 5, 3]].float())
        wide = {key for key, tensor in tensors.items() if tensor.dtype == torch.float32}
        assert wide == {"emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias"}

    monkeypatch.setattr("rwkv_peft.release.check.rwkv_sequence", read)
    package_logits(base, torch.tensor([3, 5, 3]))
