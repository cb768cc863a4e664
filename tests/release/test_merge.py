"""Merging: exact arithmetic, the base's keys and dtypes, every adapter tensor accounted for, clear refusals."""

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rwkv_peft.adapters.inject import inject
from rwkv_peft.adapters.load import load_tensors
from rwkv_peft.adapters.methods import METHODS, is_saved
from rwkv_peft.config import AdapterConfig
from rwkv_peft.errors import UserError
from rwkv_peft.files.adapter_file import Adapter, AdapterMetadata, save_adapter
from rwkv_peft.files.adapters import read_adapter
from rwkv_peft.files.base import base_of, open_base, save_model
from rwkv_peft.files.fingerprint import fingerprint
from rwkv_peft.files.rwkv_peft_file import write_rwkv_peft
from rwkv_peft.models.rwkv6.model import RWKV6
from rwkv_peft.release import merge_command as merge_cli
from rwkv_peft.release.merge import Merge, MergeOptions, merged_tensors
from rwkv_peft.training.run import main as train

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = tuple(name for name in METHODS if is_saved(name))
TARGETS = ("att.key", "att.output", "ffn.key", "ffn.value")
RANK = 8


def params_of(variant, weight, rank=RANK, std=0.05, seed=0):
    """Random tensors of one adapted layer; constants that its weight tells are what they are."""
    method, generator = METHODS[variant], torch.Generator().manual_seed(seed)
    shapes = method.shapes(rank, 4, *weight.shape)
    params = {
        name: std * torch.randn(shapes[name], generator=generator) for name in (*method.parameters, *method.constants)
    }
    told = {} if method.residual else method.initial_factors(weight, AdapterConfig(rank=rank))
    return params | told


def adapter_of(variant, base, targets=TARGETS, seed=0, **changes):
    """{key: tensor} and metadata of a random adapter on a base."""
    modules = [
        key.removesuffix(".weight") for key in base if key.endswith(tuple(f"{target}.weight" for target in targets))
    ]
    tensors = {
        f"{module}.{name}": tensor
        for number, module in enumerate(modules)
        for name, tensor in params_of(variant, base[f"{module}.weight"], seed=seed + number).items()
    }
    values = {
        "variant": variant,
        "rank": RANK,
        "scale": 0.5 if METHODS[variant].scaled else 1.0,
        "base_fingerprint": fingerprint(base),
    } | changes
    return tensors, AdapterMetadata(**values)


@pytest.fixture
def folder(tmp_path, tiny_state):
    """A folder with base.pth (bfloat16)."""
    save_model(tmp_path / "base.pth", tiny_state(dtype=torch.bfloat16))
    return tmp_path


def run(folder, *flags, adapter="a.safetensors", output="merged.pth"):
    """Run merge_bone.py's main inside the folder; returns the merged state dict."""
    argv = [
        "--base_model",
        folder / "base.pth",
        "--bone_checkpoint",
        folder / adapter,
        "--output",
        folder / output,
        *flags,
    ]
    assert merge_cli.main([str(word) for word in argv]) == 0
    return open_base(folder / output).tensors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0])
def test_merged_weights_are_base_plus_delta_cast_once(folder, variant, scale):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base)
    save_adapter(folder / "a.safetensors", tensors, metadata)
    merged = run(folder, "--scale", scale, "--output_dtype", "fp32", "--verify")
    assert list(merged) == list(base)
    modules = read_adapter(folder / "a.safetensors").modules()
    for key, tensor in base.items():
        params = modules.get(key.removesuffix(".weight"))
        if params is None:
            assert torch.equal(merged[key], tensor.float())
            continue
        exact = tensor.double() + scale * METHODS[variant].delta(tensor.double(), params, scale=metadata.scale)
        # residual variants subtract from a base rounded to bfloat16, as training does
        tolerance = 1e-2 if METHODS[variant].residual else 1e-5
        torch.testing.assert_close(merged[key].double(), exact, rtol=tolerance, atol=tolerance)
        assert (merged[key] - tensor.float()).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_base_keys_order_shapes_and_dtypes(tmp_path, tiny_state, dtype):
    save_model(tmp_path / "base.pth", tiny_state(dtype=dtype))
    base = open_base(tmp_path / "base.pth").tensors
    save_adapter(tmp_path / "a.safetensors", *adapter_of("bat-in", base))
    merged = run(tmp_path)
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in merged.items()] == [
        (key, tensor.shape, tensor.dtype) for key, tensor in base.items()
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bands_of_rows_give_the_whole_result(tiny_state, variant, monkeypatch):
    base = tiny_state(dim_ffn=104)
    adapter = Adapter(*adapter_of(variant, base))
    whole = merged_tensors(base_of(base), [("a", adapter)])
    monkeypatch.setattr("rwkv_peft.release.merge.BAND", 1000)
    banded = merged_tensors(base_of(base), [("a", adapter)])
    for key in base:
        torch.testing.assert_close(banded[key], whole[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_unmerge_recovers_the_base(tiny_state, variant, scale):
    base = tiny_state()
    adapters = [("a", Adapter(*adapter_of(variant, base))), ("b", Adapter(*adapter_of("bat-in", base, seed=7)))]
    merged = merged_tensors(base_of(base), adapters, MergeOptions(scale=scale))
    back = merged_tensors(base_of(merged), adapters, MergeOptions(scale=scale, unmerge=True))
    assert any((merged[key] - base[key]).abs().max() > 0.1 for key in base)
    for key in base:
        torch.testing.assert_close(back[key], base[key], rtol=1e-4, atol=2e-5)


def test_merging_leaves_its_inputs_alone(tiny_state):
    base = tiny_state()  # float32, so that no cast stands between inputs and arithmetic
    tensors, metadata = adapter_of("bat-in", base)
    tensors |= {"blocks.0.ln1.weight": torch.ones(64)}
    before = {key: tensor.clone() for key, tensor in (base | tensors).items()}
    merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    assert all(
        torch.equal(before[key], tensor)
        for key, tensor in (tensors | {k: base[k] for k in base if k not in tensors}).items()
    )
    assert not torch.equal(base["blocks.0.ln1.weight"], torch.ones(64))


def test_unmerge_refuses_what_it_cannot_restore(folder):
    base = open_base(folder / "base.pth").tensors
    save_adapter(folder / "a.safetensors", {"blocks.0.ln1.weight": torch.ones(64)}, AdapterMetadata("none"))
    with pytest.raises(UserError, match="replaced whole"):
        run(folder, "--unmerge")
    tensors, metadata = adapter_of("bat-in", base)
    singular = {key: -torch.eye(RANK).expand_as(tensor).contiguous() for key, tensor in tensors.items()}
    save_adapter(folder / "a.safetensors", singular, metadata)
    with pytest.raises(UserError, match="no inverse"):
        run(folder, "--unmerge")


def test_unmerge_refuses_the_base_itself_and_says_what_it_cannot_tell(folder, capsys):
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", open_base(folder / "base.pth").tensors))
    with pytest.raises(UserError, match="is the base that .* was trained on, without the adapter"):
        run(folder, "--unmerge")
    run(folder, "--unmerge", "--any_base")
    assert "nothing in these files can tell whether this adapter was merged" in capsys.readouterr().out


def test_several_adapters_apply_in_order(folder):
    base = open_base(folder / "base.pth").tensors
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", base))
    first = run(folder, "--output_dtype", "fp32", output="first.pth")
    tensors, metadata = adapter_of("bat-out", base, seed=5)
    between = run(folder, output="between.pth")  # what the second adapter's training started from
    save_adapter(
        folder / "b.safetensors", tensors, AdapterMetadata("bat-out", RANK, base_fingerprint=fingerprint(between))
    )
    argv = [
        "--base_model",
        folder / "base.pth",
        "--bone_checkpoint",
        folder / "a.safetensors",
        folder / "b.safetensors",
        "--output",
        folder / "both.pth",
        "--output_dtype",
        "fp32",
    ]
    merge_cli.main([str(word) for word in argv])
    both = open_base(folder / "both.pth").tensors
    expected = merged_tensors(base_of(first), [("b", Adapter(tensors, metadata))])
    for key in base:
        torch.testing.assert_close(both[key], expected[key], rtol=1e-5, atol=1e-6)
    argv[3:5] = argv[4:2:-1]
    with pytest.raises(UserError, match="another base"):
        merge_cli.main([str(word) for word in argv])


def test_whole_tensors_take_the_place_of_the_base(folder):
    base = open_base(folder / "base.pth").tensors
    whole = {"blocks.1.att.time_decay": torch.randn(1, 1, 64), "head.weight": torch.randn(80, 64)}
    save_adapter(folder / "a.safetensors", whole | adapter_of("bone", base)[0], AdapterMetadata("bone", RANK))
    merged = run(folder, "--output_dtype", "fp32")
    for key, tensor in whole.items():
        assert torch.equal(merged[key], tensor)


def test_time_states_are_added_at_the_end(folder):
    states = {f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}
    torch.save(states, folder / "state.pth")
    merged = run(folder, adapter="state.pth")
    assert list(merged)[-2:] == list(states)
    assert torch.equal(merged["blocks.1.att.time_state"], states["blocks.1.att.time_state"].bfloat16())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda states: dict(list(states.items())[:1]),
            "time states of 1 of the model's 2 layers.*blocks.1.att.time_state",
        ),
        (lambda states: {key: tensor[:1] for key, tensor in states.items()}, "has shape .1, 16, 16."),
        (lambda states: states | {"blocks.5.att.time_state": torch.ones(4, 16, 16)}, "no place in the base"),
    ],
)
def test_time_states_are_for_every_layer(folder, change, message):
    torch.save(change({f"blocks.{i}.att.time_state": torch.randn(4, 16, 16) for i in range(2)}), folder / "state.pth")
    with pytest.raises(UserError, match=message):
        run(folder, adapter="state.pth")
    assert not (folder / "merged.pth").exists()


# Files of other tools


def foreign(tensors, rename):
    return {key.replace(".bone", rename): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    "variant, suffix, targets, mode",
    [
        ("bat-in", ".bone", TARGETS, None),
        ("bat-out", ".bone", TARGETS, None),
        ("bat-in", ".bone", ("att.key",), "bat"),
        ("bat-in", ".bone", ("att.key",), "bat-in"),
        ("bat-out", ".bone", ("att.key",), "bat-out"),
        ("bat-in", ".disha", ("att.key",), None),
        ("bone", ".bone", TARGETS, None),
        ("bone", ".disha", TARGETS, None),
        ("oldest", ".bone", TARGETS, None),
    ],
)
def test_flat_files_of_rwkv_peft_merge(folder, variant, suffix, targets, mode):
    base = open_base(folder / "base.pth").tensors
    actual = "bat-out" if variant == "oldest" else variant
    tensors, metadata = adapter_of(actual, base, targets)
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    if variant == "oldest":
        tensors = {key: tensor.reshape(-1, RANK) for key, tensor in tensors.items()}
    torch.save(foreign(tensors, suffix), folder / "a.pth")
    merged = run(folder, *(("--bone_mode", mode) if mode else ()), adapter="a.pth")
    assert all(torch.equal(merged[key], expected[key]) for key in base)


def test_an_ambiguous_variant_is_asked_for(folder):
    tensors, _ = adapter_of("bat-in", open_base(folder / "base.pth").tensors, ("att.key",))
    torch.save(tensors, folder / "a.pth")
    with pytest.raises(UserError, match="give --bone_mode"):
        run(folder, adapter="a.pth")


def test_lora_and_pissa_files_of_rwkv_peft_merge(folder):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of("lora", base)
    torch.save(tensors, folder / "a.pth")
    with pytest.raises(UserError, match="--lora_alpha"):
        run(folder, adapter="a.pth")
    merged = run(folder, "--lora_alpha", 4, adapter="a.pth")
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])  # scale 4 / 8
    assert all(torch.equal(merged[key], expected[key]) for key in base)

    tensors, metadata = adapter_of("pissa", base, scale=1.0)
    paths = write_rwkv_peft(folder / "p.pth", Adapter(tensors, metadata))
    assert [path.name for path in paths] == ["p.pth", "init_p.pth"]
    merged = run(folder, "--lora_init", folder / "init_p.pth", adapter="p.pth")
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    assert all(torch.equal(merged[key], expected[key]) for key in base)
    initial = load_flat(folder / "init_p.pth")
    assert all(key.startswith("model.blocks.") for key in initial)  # as RWKV-PEFT writes it since 2025-02
    torch.save({key.removeprefix("model."): tensor for key, tensor in initial.items()}, folder / "earlier.pth")
    merged = run(folder, "--type", "pissa", "--lora_init", folder / "earlier.pth", adapter="p.pth", output="e.pth")
    assert all(torch.equal(merged[key], expected[key]) for key in base)
    with pytest.raises(UserError, match="--type bone contradicts .*p.pth, which holds a pissa adapter"):
        run(folder, "--type", "bone", "--lora_init", folder / "init_p.pth", adapter="p.pth")
    torch.save(dict(list(initial.items())[:-1]), folder / "short.pth")
    with pytest.raises(UserError, match="is not the init file"):
        run(folder, "--lora_init", folder / "short.pth", adapter="p.pth")


def test_the_folder_of_a_run_stands_for_its_adapter(folder):
    adapter = adapter_of("bat-in", open_base(folder / "base.pth").tensors)
    save_adapter(folder / "run" / "adapter.safetensors", *adapter)
    save_adapter(folder / "a.safetensors", *adapter)
    expected = run(folder)
    for _ in range(2):  # what an earlier merge wrote into the folder is no input
        merged = run(folder, adapter="run", output="run/merged.pth")
        assert all(torch.equal(merged[key], expected[key]) for key in expected)
    save_model(folder / "full" / "rwkv.pth", expected)
    with pytest.raises(UserError, match="full/rwkv.pth is its model, nothing merges"):
        run(folder, adapter="full")


def test_an_adapter_that_is_given_as_the_base_is_told(folder):
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", open_base(folder / "base.pth").tensors))
    with pytest.raises(UserError, match="a.safetensors is an adapter, not a base model; give it as --bone_load"):
        train(["--load_model", str(folder / "a.safetensors"), "--data_file", "data"])


@pytest.mark.parametrize(
    "missing", [("head.weight",), ("emb.weight", "head.weight"), ("blocks.0.att.receptance.weight",)]
)
def test_a_model_that_lacks_a_part_is_no_adapter(folder, tiny_state, missing):
    torch.save({key: tensor for key, tensor in tiny_state().items() if key not in missing}, folder / "part.pth")
    with pytest.raises(UserError, match=f"part.pth is a model without {' and '.join(missing)}, and no adapter"):
        run(folder, adapter="part.pth")
    assert not (folder / "merged.pth").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_an_adapter_that_is_no_floats_is_refused(folder, dtype, suffix):
    tensors = {"blocks.0.att.key.bone": torch.ones(8, 8, 8, dtype=dtype)}
    if suffix == "pth":
        torch.save(tensors, folder / "a.pth")
    else:
        metadata = json.dumps({"variant": "bat-in", "rank": 8, "format_version": 1})
        save_file(tensors, folder / "a.safetensors", {"rwkv_peft": metadata})
    with pytest.raises(UserError, match=f"a.{suffix}: blocks.0.att.key.bone is {str(dtype)[6:]}; weights must be"):
        run(folder, adapter=f"a.{suffix}")


@pytest.mark.parametrize("version", ["Infinity", "NaN", "1e400", "-Infinity", "null", "[]"])
def test_an_adapter_whose_format_is_no_number_is_refused(folder, version):
    metadata = f'{{"variant": "bat-in", "rank": 8, "format_version": {version}}}'
    save_file({"blocks.0.att.key.bone": torch.ones(8, 8, 8)}, folder / "a.safetensors", {"rwkv_peft": metadata})
    with pytest.raises(UserError, match="metadata cannot be read"):
        run(folder)


@pytest.mark.parametrize("odd", [torch.ones(2, 64), torch.ones(64), torch.tensor(1.0)])
def test_a_lora_file_of_several_ranks_is_refused(folder, odd):
    tensors, _ = adapter_of("lora", open_base(folder / "base.pth").tensors)
    torch.save(tensors | {"blocks.1.att.key.lora_A": odd}, folder / "a.pth")
    with pytest.raises(UserError, match=r"lora_A have the shapes \(8, 64\)"):
        run(folder, "--lora_alpha", 4, adapter="a.pth")


def test_a_bone_file_on_what_is_no_matrix_is_refused(folder):
    torch.save({"blocks.0.ln1.bone": torch.ones(4, 16, 16)}, folder / "a.pth")
    with pytest.raises(UserError, match="is no linear layer"):
        run(folder, "--bone_mode", "bat-in", adapter="a.pth")


def load_flat(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("variant, scale", [("bone-mini", 1.0), ("olora", 0.5), ("lora-ga", 0.25), ("pissa", 2.0)])
def test_what_rwkv_peft_calls_otherwise_exports_to_the_same_merge(folder, variant, scale):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base, scale=scale)
    paths = write_rwkv_peft(folder / "flat.pth", Adapter(tensors, metadata), base=base)
    back = read_adapter(paths[0], base=base, init=paths[1] if len(paths) > 1 else None)
    assert back.metadata.variant == ("bone" if variant == "bone-mini" else "pissa")
    merged, expected = (
        merged_tensors(base_of(base), [("a", adapter)]) for adapter in (back, Adapter(tensors, metadata))
    )
    assert all(torch.equal(merged[key], expected[key]) for key in base)


def test_export_overwrites_no_init_file_and_needs_the_widths_of_bone_mini(folder):
    base = open_base(folder / "base.pth").tensors
    (folder / "init_flat.pth").write_text("another's")
    with pytest.raises(UserError, match="init_flat.pth exists"):
        write_rwkv_peft(folder / "flat.pth", Adapter(*adapter_of("pissa", base)))
    assert (folder / "init_flat.pth").read_text() == "another's" and not (folder / "flat.pth").exists()
    with pytest.raises(UserError, match="give --base_model"):
        write_rwkv_peft(folder / "flat.pth", Adapter(*adapter_of("bone-mini", base)))


@pytest.mark.parametrize("variant", ["bone", "bat-in", "lora", "pissa"])
@pytest.mark.parametrize("parameter", ["disha", "bone"])
def test_export_to_rwkv_peft_and_back(folder, variant, parameter):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base, scale=1.0)
    whole = {"blocks.0.ln1.weight": torch.randn(64)}
    write_rwkv_peft(folder / "flat.pth", Adapter(tensors | whole, metadata), parameter)
    init = folder / "init_flat.pth" if variant == "pissa" else None
    back = read_adapter(folder / "flat.pth", base=base, init=init, alpha=RANK if variant == "lora" else None)
    assert back.metadata.variant == variant and set(back.tensors) == set(tensors | whole)
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in (tensors | whole).items())


def test_export_refuses_what_rwkv_peft_does_not_have(folder):
    tensors, metadata = adapter_of("bat-out", open_base(folder / "base.pth").tensors)
    with pytest.raises(UserError, match="no bat-out"):
        write_rwkv_peft(folder / "flat.pth", Adapter(tensors, metadata))


@pytest.mark.parametrize(
    "kind, init, variant",
    [
        ("BONE", True, "bone"),
        ("BONE", "bat", "bat-out"),
        ("BONE", True, "bat-out"),
        ("BONE", "bat-in", "bat-in"),
        ("BONE", "bat-out", "bat-out"),
        ("BONE", False, "bone"),
        ("MISS", True, "bone"),
        ("MISS", "bat", "bat-out"),
        ("MISS", "mini", "bone-mini"),
        ("LORA", True, "lora"),
    ],
)
@pytest.mark.parametrize("official", [True, False])
def test_folders_of_hugging_face_peft_merge(folder, kind, init, variant, official):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(variant, base)
    write_hf_folder(folder, tensors, {"peft_type": kind, "init_weights": init}, official)
    merged = run(folder, adapter="hf")
    expected = merged_tensors(base_of(base), [("a", Adapter(tensors, metadata))])
    assert all(torch.equal(merged[key], expected[key]) for key in base)


def write_hf_folder(folder, tensors, config, official=True):
    """A folder hf as peft saves it; config is added to what every one here says."""
    kind, peft = config["peft_type"], {}
    for key, tensor in tensors.items():
        key = (
            key.replace(".bone", f".{kind.lower()}_block")
            .replace("lora_A", "lora_A.weight")
            .replace("lora_B", "lora_B.weight")
        )
        if not official:
            key = "rwkv." + key.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        peft[f"base_model.model.{key}"] = tensor
    (folder / "hf").mkdir()
    save_file(peft, folder / "hf" / "adapter_model.safetensors")
    config = {"r": RANK, "mini_r": 4, "lora_alpha": 4, "init_lora_weights": True} | config
    given = {key: value for key, value in config.items() if value != "none"}
    (folder / "hf" / "adapter_config.json").write_text(json.dumps(given))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "IA3", "r": 4}, "IA3 adapter"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True}, "use_dora"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}, "pissa"),
        (None, r"^\S+ has no adapter_config.json"),
    ],
)
def test_folders_that_cannot_be_merged_are_refused(folder, config, message):
    (folder / "hf").mkdir()
    save_file(
        {"base_model.model.blocks.0.att.key.bone_block": torch.ones(4, 64)}, folder / "hf" / "adapter_model.safetensors"
    )
    if config:
        (folder / "hf" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        run(folder, adapter="hf")


@pytest.mark.parametrize(
    "variant, config, message",
    [
        ("bone", {"init_weights": "bat-in"}, "goes with tensors of 3 dimensions"),
        ("bat-in", {"init_weights": "mini"}, "goes with tensors of 2 dimensions"),
        ("bone", {"init_weights": "ortho"}, "init_weights is 'ortho'"),
        ("bone", {"r": 64}, "and r is 64"),
        ("bone", {"r": "none"}, "r = None"),
        ("lora", {"peft_type": "LORA", "r": True}, "r = True"),
        ("lora", {"peft_type": "LORA", "lora_alpha": "none"}, "lora_alpha = None"),
        ("lora", {"peft_type": "LORA", "lora_alpha": float("inf")}, "lora_alpha = inf"),
        ("lora", {"peft_type": "LORA", "r": 64}, "lora_A has shape .* and r is 64"),
        ("lora", {"peft_type": "LORA", "lora_bias": True}, "lora_bias"),
    ],
)
def test_settings_of_peft_that_contradict_the_tensors_are_refused(folder, variant, config, message):
    tensors, _ = adapter_of(variant, open_base(folder / "base.pth").tensors)
    write_hf_folder(folder, tensors, {"peft_type": "BONE", "init_weights": True} | config)
    with pytest.raises(UserError, match=message):
        run(folder, adapter="hf")


def test_settings_of_peft_that_are_no_object_are_refused(folder):
    write_hf_folder(folder, adapter_of("bone", open_base(folder / "base.pth").tensors)[0], {"peft_type": "BONE"})
    (folder / "hf" / "adapter_config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no settings, but a list"):
        run(folder, adapter="hf")


@pytest.mark.parametrize("init", [True, "bat", "bat-in", "mini"])
def test_bone_trained_through_our_own_config_merges_as_it_unloads(folder, init):
    peft = pytest.importorskip("peft")
    from rwkv_peft.hf import BoneConfig

    mini = {"mini_r": 4} if init == "mini" else {}
    config = BoneConfig(r=RANK, init_weights=init, target_modules=["att.key", "att.value"], **mini)
    assert_merges_as_peft_unloads(peft, folder, config)


@pytest.mark.parametrize("init", [True, "bat", "mini"])
def test_an_adapter_trained_in_peft_merges_as_peft_merges_it(folder, init):
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "MissConfig"):
        pytest.skip("this peft has no MissConfig")
    config = peft.MissConfig(r=RANK, mini_r=4, init_weights=init, target_modules=["att.key", "ffn.key", "ffn.value"])
    assert_merges_as_peft_unloads(peft, folder, config)


def assert_merges_as_peft_unloads(peft, folder, config):
    base = open_base(folder / "base.pth").tensors
    model = RWKV6(base_of(base).config)
    model.load_state_dict({key: tensor.float() for key, tensor in base.items()})
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "_block" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(folder / "hf")
    merged = run(folder, "--output_dtype", "fp32", adapter="hf")
    expected = wrapped.merge_and_unload().state_dict()
    assert set(expected) == set(merged)
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    assert (merged["blocks.0.att.key.weight"] - base["blocks.0.att.key.weight"]).abs().max() > 0.01


def test_a_folder_of_another_architecture_is_refused(folder, shared_data):
    with pytest.raises(UserError, match="no place in the base"):
        run(folder, adapter=shared_data / "peft_bone_adapters" / "bone_r4")


# What the merged file computes, and quantized bases


@pytest.mark.parametrize("mode", ["bone", "bone-mini", "bat-in", "bat-out"])
def test_the_merged_file_computes_what_base_plus_adapter_computes(folder, mode):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of(mode, base)
    save_adapter(folder / "a.safetensors", tensors, metadata)
    merged = run(folder, "--output_dtype", "fp32")

    def model(state):
        built = RWKV6(base_of(state).config)
        built.load_state_dict({key: tensor.float() for key, tensor in state.items()})
        return built

    adapted = model(base)
    inject(adapted, AdapterConfig(mode=mode, rank=RANK, mini_rank=4, targets=TARGETS))
    load_tensors(adapted, read_adapter(folder / "a.safetensors").tensors)
    tokens = torch.randint(80, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain, on, off = (each(tokens)[0] for each in (model(base), adapted, model(merged)))
    torch.testing.assert_close(off, on, rtol=1e-4, atol=1e-4)
    assert (on - plain).abs().max() > 0.1


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_an_adapter_on_a_quantized_base_merges_into_what_it_was_trained_on(folder, quant, capsys):
    pytest.importorskip("bitsandbytes")
    from rwkv_peft.adapters.quant import roundtrip

    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of("bat-in", base, quant=quant)
    save_adapter(folder / "a.safetensors", tensors, metadata)
    merged = run(folder, "--output_dtype", "fp32")
    plain = run(folder, "--output_dtype", "fp32", "--quant", "none", output="plain.pth")
    key = "blocks.0.ffn.key.weight"
    bone = {"bone": tensors["blocks.0.ffn.key.bone"]}
    for result, weight in ((merged, roundtrip(base[key], quant).float()), (plain, base[key].float())):
        torch.testing.assert_close(result[key], weight + METHODS["bat-in"].delta(weight, bone), rtol=1e-5, atol=1e-6)
    assert not torch.equal(merged[key], plain[key])
    lost = ((roundtrip(base[key], quant).float() - base[key].float()).norm() / base[key].float().norm()).item()
    assert f"differs from it by {lost:.0%}"[:-1] in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot undo"):
        run(folder, "--unmerge")
    with pytest.raises(UserError, match=f"contradicts .*, which was trained on a base quantized to {quant}"):
        run(folder, "--quant", "int8" if quant == "nf4" else "nf4")


# Refusals


def test_an_adapter_of_another_base_is_refused(folder, tiny_state):
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", tiny_state(seed=9)))
    with pytest.raises(UserError, match="trained on another base"):
        run(folder)
    run(folder, "--any_base")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {f"model.{key}": value for key, value in t.items()}, "no place in the base"),
        (lambda t: {key.replace("blocks.1", "blocks.7"): value for key, value in t.items()}, "no place in the base"),
        (lambda t: {key: value[:-1] for key, value in t.items()}, "needs .*trained on another model"),
        (lambda t: {key: torch.zeros_like(value) for key, value in t.items()}, "changes nothing"),
        (lambda t: t | {"blocks.0.ln1.weight": torch.ones(3)}, "has shape .3,."),
        (lambda t: t | {"blocks.0.att.key.lora_A": torch.ones(3, 3)}, "holds"),
        (lambda t: t | {"blocks.0.ln1.bone": torch.ones(8, 8, 8)}, "no linear layer"),
        (lambda t: t | {"blocks.0.att.value.bone": torch.ones(0, 8, 8)}, "shape .0, 8, 8."),
        (lambda t: t | {"blocks.0.att.value.bone": torch.tensor(1.0)}, "shape .., which no bat-in adapter has"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_and_leave_no_file(folder, change, message):
    tensors, metadata = adapter_of("bat-in", open_base(folder / "base.pth").tensors)
    save_adapter(folder / "a.safetensors", change(tensors), metadata)
    before = sorted(os.listdir(folder))
    with pytest.raises(UserError, match=message):
        run(folder)
    assert sorted(os.listdir(folder)) == before


def test_a_result_that_is_not_finite_is_refused(folder):
    tensors, metadata = adapter_of("bat-in", open_base(folder / "base.pth").tensors)
    save_adapter(folder / "a.safetensors", {key: tensor * 1e7 for key, tensor in tensors.items()}, metadata)
    with pytest.raises(UserError, match="holds NaN or Inf, after the merge.*too large for float16"):
        run(folder, "--output_dtype", "fp16")
    assert not (folder / "merged.pth").exists()
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(
            folder / "a.safetensors", {key: tensor * float("inf") for key, tensor in tensors.items()}, metadata
        )


@pytest.mark.parametrize(
    "variant, change, flags, message",
    [
        ("lora", lambda tensor: tensor, ("--lora_alpha", 0), "changes no weight: what the adapters add is zero"),
        ("bone", lambda tensor: 1e-8 * tensor, (), "lost in the cast to bfloat16; --output_dtype fp32 keeps it"),
        ("bone", lambda tensor: 1e-20 * tensor, ("--output_dtype", "fp32"), "changes no weight"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry_run",)])
def test_a_merge_that_equals_the_base_is_refused(folder, variant, change, flags, message, dry):
    tensors, _ = adapter_of(variant, open_base(folder / "base.pth").tensors)
    torch.save({key: change(tensor) for key, tensor in tensors.items()}, folder / "a.pth")
    with pytest.raises(UserError, match=message):
        run(folder, *flags, *dry, adapter="a.pth")
    assert sorted(os.listdir(folder)) == ["a.pth", "base.pth"]
    if "keeps it" in message and not dry:
        run(folder, "--output_dtype", "fp32", adapter="a.pth")


def test_a_value_of_the_base_beyond_the_output_dtype_names_another(folder, tiny_state):
    base = tiny_state()
    save_adapter(folder / "a.safetensors", *adapter_of("bone", base))
    base["head.weight"][0, 0] = 1e6
    save_model(folder / "base.pth", base)
    with pytest.raises(
        UserError, match="head.weight .*base's own values are too large for float16; give --output_dtype bf16"
    ):
        run(folder, "--any_base", "--output_dtype", "fp16")


def test_an_adapter_given_twice_is_refused(folder):
    save_adapter(folder / "a.safetensors", *adapter_of("bone", open_base(folder / "base.pth").tensors))
    os.link(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(UserError, match="twice"):
        merge_cli.main(
            [
                "--base_model",
                str(folder / "base.pth"),
                "--output",
                str(folder / "m.pth"),
                "--bone_checkpoint",
                str(folder / "a.safetensors"),
                str(folder / "b.safetensors"),
            ]
        )


def test_verifying_a_dry_run_is_refused(folder):
    with pytest.raises(UserError, match="--dry_run writes none"):
        run(folder, "--verify", "--dry_run")


def test_an_interrupt_leaves_no_file(folder, monkeypatch):
    save_adapter(folder / "a.safetensors", *adapter_of("bone", open_base(folder / "base.pth").tensors))

    def interrupted(path, specs, tensors):
        next(iter(tensors))
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_cli, "write_pth", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert sorted(os.listdir(folder)) == ["a.safetensors", "base.pth"]


def test_inputs_are_never_overwritten(folder):
    base = open_base(folder / "base.pth").tensors
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", base))
    os.link(folder / "base.pth", folder / "link.pth")
    for output in ("base.pth", "link.pth"):
        with pytest.raises(UserError, match="must not be overwritten"):
            run(folder, output=output)
    with pytest.raises(UserError, match="ends in .pth"):
        run(folder, output="a.safetensors")


def test_a_full_disk_is_noticed_before_the_work(folder, monkeypatch):
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", open_base(folder / "base.pth").tensors))
    monkeypatch.setattr(
        "shutil.disk_usage", lambda folder: os.terminal_size((1, 1)) and type("Usage", (), {"free": 10})
    )
    with pytest.raises(UserError, match="10 free"):
        run(folder)


def test_dry_run_writes_nothing_and_reports_all(folder, capsys):
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", open_base(folder / "base.pth").tensors))
    before = sorted(os.listdir(folder))
    merge_cli.main(
        ["--base_model", str(folder / "base.pth"), "--lora_checkpoint", str(folder / "a.safetensors"), "--dry_run"]
    )
    text = capsys.readouterr().out
    assert sorted(os.listdir(folder)) == before
    assert "bat-in rank 8 on 8 layers" in text and "changed 8 of 62 tensors" in text and "cast to bfloat16 lost" in text


def test_the_report_measures_change_and_loss(tiny_state):
    base = {key: tensor.bfloat16() for key, tensor in tiny_state().items()}
    adapter = Adapter(*adapter_of("bone", base, ("att.key",)))
    reports = []
    merging = Merge(base_of(base), [("a", adapter)]).bands(base.items(), reports.append)
    merged = {key: torch.cat([rows for _, rows in bands]) for key, bands in groupby(merging, lambda band: band[0])}
    assert [report.key for report in reports] == ["blocks.0.att.key.weight", "blocks.1.att.key.weight"]
    for report in reports:
        weight, params = base[report.key].double(), adapter.modules()[report.key.removesuffix(".weight")]
        change = METHODS["bone"].delta(weight, params)
        assert report.change == pytest.approx((change.norm() / weight.norm()).item(), rel=1e-3)
        lost = (merged[report.key].double() - weight - change).norm() / change.norm()
        assert report.lost == pytest.approx(lost.item(), rel=1e-2) and report.lost > 1e-3


def test_reading_back_notices_a_file_that_is_another(folder):
    base = open_base(folder / "base.pth").tensors
    tensors, metadata = adapter_of("bat-in", base)
    save_adapter(folder / "a.safetensors", tensors, metadata)
    merged = dict(run(folder))
    merged["head.weight"] = merged["head.weight"] + 1
    save_model(folder / "other.pth", merged)
    with pytest.raises(UserError, match="does not read back"):
        merge = Merge(base_of(base), [("a", Adapter(tensors, metadata))])
        merge_cli.read_back(folder / "other.pth", merge, folder / "base.pth", merge.specs)


def test_the_command_exits_with_2_and_one_message(folder):
    base = open_base(folder / "base.pth").tensors
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", base))
    command = [
        sys.executable,
        ROOT / "merge_bone.py",
        "--base_model",
        folder / "base.pth",
        "--output",
        folder / "m.pth",
    ]
    good = subprocess.run([*command, "--bone_checkpoint", folder / "a.safetensors"], capture_output=True, text=True)
    assert good.returncode == 0 and not good.stderr and "wrote" in good.stdout
    for flags in (["--bone_checkpoint", folder / "none.pth"], ["--bone_chekpoint", folder / "a.safetensors"]):
        bad = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert bad.returncode == 2
        assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


def test_the_table_fits_into_80_columns(tmp_path, tiny_state, capsys):
    base = tiny_state(dtype=torch.bfloat16)
    save_model(tmp_path / "base.pth", base)
    matrices = tuple(f"att.{n}" for n in ("receptance", "key", "value", "gate", "output"))
    matrices += tuple(f"ffn.{n}" for n in ("key", "receptance", "value"))
    tensors, metadata = adapter_of("bat-in", base, targets=matrices)
    whole = {f"blocks.{i}.ln1.weight": 300 * base[f"blocks.{i}.ln1.weight"] for i in range(2)}
    save_adapter(tmp_path / "a.safetensors", tensors | whole, metadata)
    for dtype, cast in (("keep", True), ("fp32", False)):
        run(tmp_path, "--output_dtype", dtype)
        printed = capsys.readouterr().out
        table = printed[printed.index("block  ") :].splitlines()[:3]
        for name in ("att.r", "att.k", "att.v", "att.g", "att.o", "ffn.k", "ffn.r", "ffn.v", "others"):
            assert f" {name} " in table[0] + " "
        assert all(len(line) <= 80 and len(line) == len(table[0]) for line in table)
        assert ("cast lost" in table[0], "the cast to bfloat16 lost at most" in printed) == (cast, cast)
