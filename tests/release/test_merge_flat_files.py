"""Files of RWKV-PEFT merge into the model that was trained, and adapters convert to such files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from release.merges import RANK, TARGETS, adapter_of, run
from rwkv_peft.checkpoints.adapter_file import Adapter
from rwkv_peft.checkpoints.adapters import AdapterSource, read_adapter
from rwkv_peft.checkpoints.base import base_of, open_base
from rwkv_peft.checkpoints.rwkv_peft_file import write_rwkv_peft
from rwkv_peft.cli.errors import UserError
from rwkv_peft.inference.loading import load_model
from rwkv_peft.release.merge import merged_tensors


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
    for flags in ((), ("--lora_alpha", "8")):
        with pytest.raises(UserError, match="p.pth has .*init_p.pth beside it, .*PiSSA.*that file as --lora_init"):
            run(folder, *flags, adapter="p.pth")
    with pytest.raises(UserError, match="init_p.pth holds the initial factors of a PiSSA, and no adapter; give it "):
        run(folder, adapter="init_p.pth")
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


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.", "model.base_model.model."])
def test_the_prefix_of_a_wrapper_is_taken_off(folder, prefix):
    base = open_base(folder / "base.pth").tensors
    tensors, _ = adapter_of("bone", base)
    tensors |= {key: tensor + 1 for key, tensor in base.items() if ".ln1." in key}
    torch.save(tensors, folder / "a.pth")
    torch.save({prefix + key: tensor for key, tensor in tensors.items()}, folder / "wrapped.pth")
    expected, merged = run(folder, adapter="a.pth"), run(folder, adapter="wrapped.pth", output="other.pth")
    assert all(torch.equal(merged[key], expected[key]) for key in base)
    torch.save(tensors | {"model.head.weight": base["head.weight"]}, folder / "mixed.pth")
    with pytest.raises(UserError, match="1 of its .* tensors have no place in the base: there is no model.head.weight"):
        run(folder, adapter="mixed.pth")


def on_blocks(base, blocks, also=()):
    """A flat file's bone tensors on some blocks, and whole tensors of the base, which it changed."""
    tensors, _ = adapter_of("bone", base)
    own = {key: tensor for key, tensor in tensors.items() if int(key.split(".")[1]) in blocks}
    return own | {key: base[key] + 1 for key in also}


@pytest.fixture
def deep(tiny_state, tmp_path):
    """Write a base of four blocks -> {key: tensor}."""
    torch.save(tiny_state(n_layer=4), tmp_path / "base.pth")
    return open_base(tmp_path / "base.pth").tensors


def test_an_adapter_of_a_model_of_fewer_blocks_is_refused(deep, tmp_path):
    """Two models of one width may differ only in depth."""
    torch.save(on_blocks(deep, (0, 1), ["blocks.1.ln1.weight"]), tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth changes only the first 2 of the 4 blocks of .*base.pth.* smaller model"):
        run(tmp_path, adapter="a.pth")
    with pytest.raises(UserError, match="a smaller model"):
        load_model(tmp_path / "base.pth", [AdapterSource(tmp_path / "a.pth")])
    assert "head.weight" in run(tmp_path, "--any_base", adapter="a.pth")


@pytest.mark.parametrize(
    "blocks, also, told",
    [
        ((3,), [], "blocks   it changes 3 of 0-3;"),
        ((1, 2), [], "blocks   it changes 1-2 of 0-3;"),
        ((0, 2, 3), [], "blocks   it changes 0, 2-3 of 0-3;"),
        ((0, 1), ["blocks.3.ln2.bias"], "blocks   it changes 0-1, 3 of 0-3;"),  # of a model as deep as the base
        ((0, 1, 2, 3), [], None),
    ],
)
def test_an_adapter_on_chosen_blocks_merges_and_says_which(deep, tmp_path, blocks, also, told, capsys):
    """A smaller model's adapter would have no gaps, and end before the base's last block."""
    torch.save(on_blocks(deep, blocks, also), tmp_path / "a.pth")
    merged = run(tmp_path, adapter="a.pth")
    changed = {key for key, tensor in deep.items() if not torch.equal(tensor, merged[key])}
    assert changed == {f"blocks.{i}.{target}.weight" for i in blocks for target in TARGETS} | set(also)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("blocks ")]
    assert len(lines) == (told is not None) and (told is None or lines[0].startswith(told))
    load_model(tmp_path / "base.pth", [AdapterSource(tmp_path / "a.pth")])


def test_blocks_that_the_base_has_not_are_refused(deep, tmp_path):
    for key in ("blocks.4.att.key.bone", "blocks.x.att.key.bone"):
        torch.save(on_blocks(deep, (2, 3)) | {key: torch.ones(RANK, 64)}, tmp_path / "a.pth")
        for flags in ((), ("--any_base",)):
            with pytest.raises(UserError, match="1 of its .* tensors have no place in the base: there is no blocks"):
                run(tmp_path, *flags, adapter="a.pth")
        with pytest.raises(UserError, match="have no place in the base"):
            load_model(tmp_path / "base.pth", [AdapterSource(tmp_path / "a.pth")])


def test_the_folder_of_a_run_of_rwkv_peft_names_its_files(folder):
    (folder / "run").mkdir()
    for name in ("rwkv-0.pth", "rwkv-1.pth", "train_log.txt"):
        (folder / "run" / name).touch()
    with pytest.raises(UserError, match=r"; give one of \S+/run/rwkv-0.pth, \S+/run/rwkv-1.pth$"):
        run(folder, adapter="run")


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


def test_bone_of_two_ranks_or_of_no_layer_of_the_base_is_refused(folder):
    tensors, _ = adapter_of("bat-in", open_base(folder / "base.pth").tensors)
    key = next(iter(tensors))
    torch.save(tensors | {key: tensors[key].reshape(-1, RANK // 2, RANK // 2)}, folder / "a.pth")
    with pytest.raises(UserError, match=f"ranks {RANK // 2}, {RANK}; they cannot be from one training"):
        run(folder, adapter="a.pth")
    torch.save({key.replace("blocks", "layers"): tensor for key, tensor in tensors.items()}, folder / "a.pth")
    with pytest.raises(UserError, match="there is no layers.*it was trained on a model of other names"):
        run(folder, adapter="a.pth")
