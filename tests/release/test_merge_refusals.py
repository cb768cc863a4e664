"""An adapter that cannot be merged is refused with a message, and every file stays as it was."""

import os
import subprocess
from dataclasses import replace

import pytest
import torch

from release.merges import RANK, ROOT, adapter_of, run
from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli.errors import UserError
from rwkv_peft.inference import command as generate_cli
from rwkv_peft.release import merge as merge_cli
from rwkv_peft.training.run import main as train


def test_another_generation_is_told_before_another_base_which_could_be_forced(folder):
    tensors, metadata = adapter_of("bat-in", open_base(folder / "base.pth").tensors)
    save_adapter(folder / "a.safetensors", tensors, replace(metadata, generation="x070", base_fingerprint="0" * 32))
    with pytest.raises(UserError, match="was trained on an RWKV-7, and .* is an RWKV-6: give the adapter's own base"):
        generate_cli.main(f"--model {folder}/base.pth --adapter {folder}/a.safetensors --prompt a".split())


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
    assert "these files do not say if this adapter was merged" in capsys.readouterr().out


def test_an_adapter_that_is_given_as_the_base_is_told(folder):
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", open_base(folder / "base.pth").tensors))
    with pytest.raises(UserError, match="a.safetensors is an adapter, not a base model; give it as --adapter of"):
        train(["--load_model", str(folder / "a.safetensors"), "--data_file", "data"])


@pytest.mark.parametrize("flag, ours", [("--use-gpu", "--device cuda"), ("--load_model", "--base_model")])
def test_a_flag_of_other_mergers_is_answered_with_ours(folder, flag, ours):
    with pytest.raises(UserError, match=f"there is no {flag} here; it is {ours}"):
        run(folder, flag)


@pytest.mark.parametrize("value, ours", [("4bit", "--quant nf4"), ("8bit", "--quant int8")])
def test_what_others_call_a_quantization_is_told(value, ours):
    with pytest.raises(UserError, match=f"{value} of other tools is {ours} here"):
        merge_cli.main(["--base_model", "x", "--bone_checkpoint", "y", "--output", "z", "--quant", value])


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
        (lambda t: t | {"x" * 10_000 + ".bone": torch.ones(8, 8, 8)}, "there is no x{200}…, and the base has"),
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
        save_adapter(folder / "a.safetensors", {key: x * float("inf") for key, x in tensors.items()}, metadata)


@pytest.mark.parametrize(
    "variant, change, flags, message",
    [
        ("lora", lambda tensor: tensor, ("--lora_alpha", 0), "changes no weight: the adapters' change is zero"),
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
    with pytest.raises(UserError, match="head.weight .*base's own values are too large for float16; give --output_"):
        run(folder, "--any_base", "--output_dtype", "fp16")


def test_an_adapter_given_twice_is_refused(folder):
    save_adapter(folder / "a.safetensors", *adapter_of("bone", open_base(folder / "base.pth").tensors))
    os.link(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(UserError, match="twice"):
        run(folder, "--bone_checkpoint", folder / "a.safetensors", folder / "b.safetensors")


def test_verifying_a_dry_run_is_refused(folder):
    with pytest.raises(UserError, match="--read_back does not go with --dry_run"):
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
    monkeypatch.setattr("rwkv_peft.checkpoints.atomic.room_at", lambda path: 10)
    with pytest.raises(UserError, match="bytes, and its disk has 10 free"):
        run(folder)


def test_the_command_exits_with_2_and_one_message(folder, warm_python):
    base = open_base(folder / "base.pth").tensors
    save_adapter(folder / "a.safetensors", *adapter_of("bat-in", base))
    command = [warm_python, ROOT / "merge_bone.py", "--base_model", folder / "base.pth", "--output", folder / "m.pth"]
    good = subprocess.run([*command, "--bone_checkpoint", folder / "a.safetensors"], capture_output=True, text=True)
    assert good.returncode == 0 and not good.stderr and "wrote" in good.stdout
    for flags in (["--bone_checkpoint", folder / "none.pth"], ["--bone_chekpoint", folder / "a.safetensors"]):
        bad = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert bad.returncode == 2
        assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
