"""Each tensor of a merged file is compared with base and adapter, whose result is computed anew."""

import pytest
import torch

from release.merges import VARIANTS, adapter_of
from rwkv_peft.checkpoints.adapter_file import Adapter, save_adapter
from rwkv_peft.checkpoints.adapters import read_adapter
from rwkv_peft.checkpoints.base import base_of, open_base, save_model
from rwkv_peft.models.rwkv7.keys import new_dimensions, shapes
from rwkv_peft.release import check as module
from rwkv_peft.release.check import SLACK, differences, main
from rwkv_peft.release.merge import LayerChange, MergeOptions, merged_tensors

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def small_bands(monkeypatch):
    """Make bands small, so that even tiny weights are compared in several."""
    monkeypatch.setattr(module, "BAND", 2048)


def of_method(state, variant, **metadata):
    """A Base, and an Adapter of a method on it."""
    return base_of(state), Adapter(*adapter_of(variant, state, **metadata))


def merge_of(base, adapter, **options):
    return merged_tensors(base, [("adapter", adapter)], MergeOptions(**options))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, output", [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16)])
def test_a_true_merge_has_no_differences_and_one_value_is_found(tiny_state, variant, dtype, output):
    base, adapter = of_method(tiny_state(n_layer=1, dtype=dtype), variant)
    merged, key = merge_of(base, adapter, dtype=output), "blocks.0.ffn.value.weight"
    assert differences(base_of(merged), base, adapter) == []
    value = merged[key][40, 3]
    value += 2 * max(torch.finfo(output).eps, 1e-5) * max(abs(value), 1)
    (line,) = differences(base_of(merged), base, adapter)
    assert line.startswith(f"{key}: 1 of {merged[key].numel():,} values, by up to ")
    assert line.endswith(", the first at [40, 3]")


@pytest.mark.parametrize("variant", ["bat-in", "bone", "dora", "pissa", "vera", "shira"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_merge_onto_the_quantized_base_or_the_original_has_no_differences(tiny_state, variant, quant):
    pytest.importorskip("bitsandbytes")
    base, adapter = of_method(tiny_state(dtype=torch.float16), variant, quant=quant, precision="bf16")
    for onto in (None, "none"):
        merged = merge_of(base, adapter, quant=onto, dtype=torch.float32)
        assert differences(base_of(merged), base, adapter) == []
    merged["blocks.0.att.key.weight"][5, 7] += 0.5
    (line,) = differences(base_of(merged), base, adapter)
    assert "blocks.0.att.key.weight: 1 of " in line and line.endswith("by up to 0.5, the first at [5, 7]")


def test_a_fault_of_merging_is_found(tiny_state, monkeypatch):
    base, adapter = of_method(tiny_state(), "bat-in")
    apply = LayerChange.apply
    monkeypatch.setattr(LayerChange, "apply", lambda change, weight: apply(change, weight) + 1e-3 * (weight > 0))
    merged = merge_of(base, adapter)
    assert len(differences(base_of(merged), base, adapter)) == len(adapter.modules())


@pytest.mark.parametrize("share, found", [(0.3, 0), (0.8, 0), (1.5, 1)])
def test_a_value_may_differ_by_the_slack_of_float32(tiny_state, share, found):
    """Half of it is for the comparison in float32; in float64 all of it counts."""
    base, adapter = of_method(tiny_state(n_layer=1), "bat-in")
    merged = merge_of(base, adapter)
    row = merged["blocks.0.att.key.weight"][5]
    row[3] += share * SLACK * row.abs().max()
    assert len(differences(base_of(merged), base, adapter)) == found


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
    assert differences(base_of(merged), base, adapter) == []
    (found,) = differences(base_of(MUTATIONS[line](merged)), base, adapter)
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


def test_a_tensor_that_was_not_merged_is_said_to_be_the_bases(files):
    folder, merged = files
    base, adapter = open_base(folder / "base.pth"), read_adapter(folder / "a.safetensors")
    key = "blocks.1.att.key.weight"
    (found,) = differences(base_of(merged | {key: base.tensors[key]}), base, adapter)
    assert found.startswith(f"{key}: ") and found.endswith(", as the base has it")


def test_trained_whole_tensors_and_time_states_are_the_adapters(tiny_state):
    base, adapter = of_method(tiny_state(dtype=torch.bfloat16), "bone")
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}
    whole = {"ln_out.weight": torch.randn(64), **states}
    adapter = Adapter(adapter.tensors | whole, adapter.metadata)
    merged = merge_of(base, adapter)
    assert differences(base_of(merged), base, adapter) == []
    merged["ln_out.weight"] = base.tensors["ln_out.weight"]
    merged["blocks.1.att.time_state"] = -merged["blocks.1.att.time_state"]
    lines = differences(base_of(merged), base, adapter)
    assert [line.split(" ")[0] for line in lines] == ["ln_out.weight:", "blocks.1.att.time_state:"]
