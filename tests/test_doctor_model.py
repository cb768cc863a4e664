"""`rwkv-peft doctor --model FILE` says what a file is, and names commands that exist and take it."""

import importlib
import shlex

import pytest
import torch

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import base_of, save_model
from rwkv_peft.cli.commands import COMMANDS, main
from rwkv_peft.cli.errors import UserError
from rwkv_peft.models import family_named
from rwkv_peft.tools.doctor import model

BASE, CONVERT = "train on rows", "make it a base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_state):
    """A folder with files of every kind, some under a name that a shell would split."""
    folder = tmp_path_factory.mktemp("kinds") / "my files"
    folder.mkdir()
    state = tiny_state(dtype=torch.bfloat16, vocab_size=257)
    save_model(folder / "base.pth", state)
    metadata = AdapterMetadata("bone", rank=8, targets=("att.key",), base_fingerprint=base_of(state).fingerprint)
    save_adapter(folder / "bone.safetensors", {"blocks.1.att.key.bone": torch.ones(8, 64)}, metadata)
    save_model(folder / "state.pth", {f"blocks.{i}.att.time_state": torch.zeros(4, 16, 16) for i in range(2)})
    for name in ("model.st", "model.gguf", "hf"):
        main(["convert", str(folder / "base.pth"), str(folder / name)])
    for name in ("7a", "7b"):
        config = (family := family_named(f"x0{name[0]}0{name[1]}")).new_dimensions(1, 64, 257)
        save_model(folder / f"{name}.pth", {key: torch.zeros(shape) for key, shape in family.shapes(config).items()})
    deep = tiny_state(dtype=torch.bfloat16) | {"blocks.0.ffn.s_emb.weight": torch.zeros(2, 4)}
    torch.save(deep, folder / "deep.pth")
    return folder


@pytest.mark.parametrize(
    "name, kind, purpose",
    [
        ("base.pth", "model, RWKV-6", BASE),
        ("model.st", "model, RWKV-6", CONVERT),
        ("hf", "model, RWKV-6", CONVERT),
        ("bone.safetensors", "adapter, written by rwkv_peft", "make one model"),
        ("7a.pth", "model, RWKV-7a (x070a)", BASE),
        ("7b.pth", "model, RWKV-7b (x070b)", BASE),
        ("state.pth", "time states of 2 layers", "bring it to Ai00"),
    ],
)
def test_a_file_is_named_with_the_commands_that_suit_it(folder, capsys, name, kind, purpose):
    capsys.readouterr()
    assert main(["doctor", "--model", str(folder / name)]) == 0
    said = capsys.readouterr().out
    about, suited = said.split("\n\n")
    assert about.startswith("kind") and kind in about
    assert ("convert" in suited) == (
        name not in ("7a.pth", "7b.pth", "bone.safetensors")
    )  # for which there is no such form
    assert any(
        line.startswith(f"{purpose}  ") and shlex.quote(str(folder / name)) in line for line in suited.split("\n")
    )


def test_what_nothing_reads_is_told(folder, capsys):
    assert main(["doctor", "--model", str(folder / "deep.pth")]) == 1
    assert capsys.readouterr().out.endswith("\nno command of rwkv-peft takes it\n")
    with pytest.raises(UserError, match=r"absent.pth"):
        main(["doctor", "--model", "absent.pth"])


@pytest.mark.parametrize("what", model.COMMANDS)
def test_every_command_that_is_named_takes_its_flags(what):
    named = {command.name: command for command in COMMANDS}
    for _, line in model.COMMANDS[what]:
        program, name, *argv = shlex.split(line.format("file"))
        assert program == "rwkv-peft"
        module, _, judge = named[name].flags.partition(":")
        getattr(importlib.import_module(f"rwkv_peft.{module}"), judge)(argv)
