"""The check passes a merged model that computes what base plus adapter compute, by its logits and by each tensor, and
fails any other."""

from dataclasses import replace

import pytest
import torch

from release.merges import VARIANTS, adapter_of
from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.methods import adapter_parameter
from rwkv_peft.checkpoints.adapter_file import Adapter, AdapterMetadata, Origin, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.config import AdapterConfig
from rwkv_peft.models import family_named
from rwkv_peft.models.rwkv6.model import RWKV6
from rwkv_peft.models.rwkv7.keys import new_dimensions, shapes
from rwkv_peft.release import merge_command as merge_cli
from rwkv_peft.release.check import SHOWN, SLACK, adapted_logits, differences, main, package_logits
from rwkv_peft.release.merge import MergeOptions, merged_tensors
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
@pytest.mark.processor
def test_a_true_merge_passes(tmp_path, tiny_state, capsys, mode):
    assert check(*make_files(tmp_path, tiny_state(), mode=mode)) == 0
    assert "MORE THAN" not in capsys.readouterr().out


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


SECOND = [  # settings of two adapters on one base, of which the second applies to the result of the first
    ({"mode": "bat-in"}, {"mode": "bat-in", "train_parts": ("ln",)}),
    ({"method": "pissa"}, {"mode": "bone", "quant": "int8"}),
    ({"method": "none", "train_parts": ("head", "time")}, {"method": "lora"}),
]


@pytest.mark.parametrize("first, second", SECOND, ids=str)
def test_several_scaled_adapters_are_checked_as_they_are_merged(tmp_path, tiny_state, capsys, first, second):
    if "quant" in second:
        pytest.importorskip("bitsandbytes")
    for name, settings in (("one", first), ("two", second)):
        (tmp_path / name).mkdir()
        base, _, _ = make_files(tmp_path / name, tiny_state(), **settings)
    merged, files = tmp_path / "merged.pth", [tmp_path / name / "adapter.safetensors" for name in ("one", "two")]
    words = f"{files[0]}=0.7 {files[1]}=-1.5"
    merge(base, words, merged)
    assert check(base, f"{files[0]}=0.7 --adapter {files[1]}=-1.5", merged) == 0, capsys.readouterr().out
    assert check(base, f"{files[0]}=0.7 {files[1]}=-1.4", merged) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_an_adapter_of_another_base_is_refused(tmp_path, tiny_state):
    """With the merge's words, and accepted if the merge would accept it."""
    base, adapter, merged = make_files(tmp_path, tiny_state())
    mine = read_adapter(adapter)
    save_adapter(adapter, mine.tensors, replace(mine.metadata, base_fingerprint="0" * 32, origin=Origin("base-7b.pth")))
    words = f"{adapter} was trained on another base: base-7b.pth, fingerprint {'0' * 32}; {base} has "
    with pytest.raises(UserError, match=words):
        check(base, adapter, merged)
    assert check(base, adapter, merged, "--any_base") == 0


def test_what_was_not_made_of_base_and_adapter_is_refused(tmp_path, tiny_state):
    base, adapter, _ = make_files(tmp_path, tiny_state())
    save_model(tmp_path / "other.pth", tiny_state(vocab_size=300))
    with pytest.raises(UserError, match="differ in their dimensions"):
        check(base, adapter, tmp_path / "other.pth")
    mine = read_adapter(adapter)
    save_adapter(adapter, {key.replace("blocks.0", "blocks.9"): t for key, t in mine.tensors.items()}, mine.metadata)
    with pytest.raises(UserError, match=f"^{adapter}: .* there is no blocks.9.att"):
        check(base, adapter, base)


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


def test_a_runtime_that_fails_is_told_in_words(tmp_path, tiny_state, monkeypatch):
    def broken(path, tokens, config):
        raise RuntimeError("no such instruction\nat all")

    monkeypatch.setattr("rwkv_peft.release.check.rwkv_sequence", broken)
    with pytest.raises(UserError, match="cannot compute .*RuntimeError: no such instruction"):
        check(*make_files(tmp_path, tiny_state()))


def test_an_adapter_on_a_base_that_was_quantized_or_changed_is_compared_on_that(tmp_path, tiny_state, capsys):
    pytest.importorskip("bitsandbytes")
    quantized, changed = ({"quant": "nf4", "mode": "bone-signed"}, {"quant": "int8"}), ("pissa", "olora")
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
        lambda: adapted_logits(opened, [("adapter", held)], tokens, {}),
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


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def small_bands(monkeypatch):
    """Make bands small, so that even tiny weights are compared in several."""
    monkeypatch.setattr("rwkv_peft.release.check.BAND", 2048)


def of_method(state, variant, **metadata):
    """A Base, and an Adapter of a method on it."""
    return base_of(state), Adapter(*adapter_of(variant, state, **metadata))


def merge_of(base, adapter, **options):
    return merged_tensors(base, [("adapter", adapter)], MergeOptions(**options))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, output", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16)])
@pytest.mark.processor
def test_a_true_merge_has_no_differences_and_one_value_is_found(tiny_state, small_bands, variant, dtype, output):
    base, adapter = of_method(tiny_state(n_layer=1, dtype=dtype), variant)
    merged, key = merge_of(base, adapter, dtype=output), "blocks.0.ffn.value.weight"
    assert differences(base_of(merged), base, [("adapter", adapter)]) == []
    value = merged[key][40, 3]
    value += 2 * max(torch.finfo(output).eps, 1e-5) * max(abs(value), 1)
    (line,) = differences(base_of(merged), base, [("adapter", adapter)])
    assert line.startswith(f"{key}: 1 of {merged[key].numel():,} values, by up to ")
    assert line.endswith(", the first at [40, 3]")


@pytest.mark.parametrize("variant", ["bat-in", "bone", "lora", "dora", "pissa"])
@pytest.mark.parametrize("amount", [0.7, -1.5])
def test_a_merge_at_a_scale_is_compared_at_that_scale(tmp_path, tiny_state, small_bands, capsys, variant, amount):
    """Logits, adapted weights, and tensors and states that take a share of the base's places."""
    torch.manual_seed(0)
    state = tiny_state(n_layer=1, dtype=BF16)
    tensors, metadata = adapter_of(variant, state)
    tensors |= {"blocks.0.ln1.weight": torch.randn(64), "head.weight": torch.randn(80, 64)}
    tensors |= {"blocks.0.att.time_state": torch.randn(4, 16, 16)}
    base, adapter, merged = (tmp_path / name for name in ("base.pth", "a.safetensors", "m.pth"))
    save_model(base, state)
    save_adapter(adapter, tensors, metadata)
    merge(base, f"{adapter}={amount}", merged, "--output_dtype", "fp32")
    assert check(base, f"{adapter}={amount}", merged) == 0
    assert check(base, adapter, merged) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["bat-in", "bone", "dora", "pissa"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_merge_onto_the_quantized_base_or_the_original_has_no_differences(tiny_state, variant, quant):
    pytest.importorskip("bitsandbytes")
    base, adapter = of_method(tiny_state(dtype=torch.float16), variant, quant=quant, precision="bf16")
    for onto in (None, "none"):
        merged = merge_of(base, adapter, quant=onto, dtype=torch.float32)
        assert differences(base_of(merged), base, [("adapter", adapter)]) == []
    merged["blocks.0.att.key.weight"][5, 7] += 0.5
    (line,) = differences(base_of(merged), base, [("adapter", adapter)])
    assert "blocks.0.att.key.weight: 1 of " in line and line.endswith("by up to 0.5, the first at [5, 7]")


@pytest.mark.parametrize("share, found", [(0.3, 0), (0.8, 0), (1.5, 1)])
def test_a_value_may_differ_by_the_slack_of_float32(tiny_state, share, found):
    base, adapter = of_method(tiny_state(n_layer=1), "bat-in")
    merged = merge_of(base, adapter)
    row = merged["blocks.0.att.key.weight"][5]
    row[3] += share * SLACK * row.abs().max()
    assert len(differences(base_of(merged), base, [("adapter", adapter)])) == found


def altered(state, key, where, change):
    """{key: tensor} with values of one tensor changed."""
    tensor = state[key].clone()
    tensor[where] = change(tensor[where])
    return state | {key: tensor}


def exchanged(state, one, other):
    """The same tensors with two keys swapped."""
    keys = {one: other, other: one}
    return {keys.get(key, key): state[keys.get(key, key)] for key in state}


KEY, LAST = "blocks.0.ffn.key.weight", ("head.weight", "ln_out.bias")
MUTATIONS = {
    "emb.weight: 64 of 1,280 values": lambda s: altered(s, "emb.weight", slice(3, 5), torch.zeros_like),
    "blocks.1.att.w0: 1 of 32 values": lambda s: altered(s, "blocks.1.att.w0", (0, 0, 7), lambda x: x + 0.01),
    "head.weight: 1 of 1,280 values": lambda s: altered(s, "head.weight", (39, 31), lambda x: 1.01 * x),
    f"{KEY}: 1 of 4,096 values": lambda s: altered(s, KEY, (100, 2), lambda x: 1.01 * x),
    "the order of the keys: head.weight is in the place of the base's ln_out": lambda s: exchanged(s, *LAST),
    "ln_out.weight: float32, and the base has bfloat16": lambda s: s | {"ln_out.weight": s["ln_out.weight"].float()},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(folder with base.pth, a.safetensors and merged.pth, the merged {key: tensor}) of a tiny RWKV-7 in bfloat16."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    dimensions = new_dimensions(n_layer=2, n_embd=32, vocab_size=40, head_size=16)
    state = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes(dimensions).items()}
    save_model(folder / "base.pth", state)
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", state))
    save_model(folder / "merged.pth", merge_of(open_base(folder / "base.pth"), read_adapter(folder / "a.safetensors")))
    return folder, dict(open_base(folder / "merged.pth").tensors)


@pytest.mark.parametrize("line", MUTATIONS)
def test_what_differs_is_named(files, line):
    folder, merged = files
    base, adapter = open_base(folder / "base.pth"), read_adapter(folder / "a.safetensors")
    assert differences(base_of(merged), base, [("adapter", adapter)]) == []
    (found,) = differences(base_of(MUTATIONS[line](merged)), base, [("adapter", adapter)])
    assert found.startswith(line)


def test_the_command_names_all_that_differs(files, capsys):
    pytest.importorskip("rwkv")
    folder, merged = files
    command = [f"--base_model={folder}/base.pth", f"--bone_checkpoint={folder}/a.safetensors", "--tokens=8"]
    assert main([*command, f"--merged={folder}/merged.pth"]) == 0
    assert "tensors: each as base and adapter make it" in capsys.readouterr().out
    for mutation in MUTATIONS.values():
        merged = mutation(merged)
    save_model(folder / "mutated.pth", merged)
    assert main([*command, f"--merged={folder}/mutated.pth"]) == 1
    printed = capsys.readouterr().out
    assert all(f"\nDIFFERS  {line}" in printed for line in MUTATIONS) and printed.count("DIFFERS") == len(MUTATIONS)


def test_trained_whole_tensors_and_time_states_are_the_adapters(tiny_state):
    base, adapter = of_method(tiny_state(dtype=torch.bfloat16), "bone")
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}
    whole = {"ln_out.weight": torch.randn(64), **states}
    adapter = Adapter(adapter.tensors | whole, adapter.metadata)
    merged = merge_of(base, adapter)
    assert differences(base_of(merged), base, [("adapter", adapter)]) == []
    merged["ln_out.weight"] = base.tensors["ln_out.weight"]
    merged["blocks.1.att.time_state"] = -merged["blocks.1.att.time_state"]
    lines = differences(base_of(merged), base, [("adapter", adapter)])
    assert [line.split(" ")[0] for line in lines] == ["ln_out.weight:", "blocks.1.att.time_state:"]
