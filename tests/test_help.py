"""Every command and every program of the repository describes itself."""

import re
import sys
from pathlib import Path

import pytest

from rwkv_peft.cli.commands import COMMANDS, main
from training.runs import finish, start

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [ROOT / "train.py", ROOT / "merge_bone.py", *sorted((ROOT / "demo").glob("*.py"))]
BENCHMARKS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "parse_args" in path.read_text()]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command.name, "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("path", [*SCRIPTS, *BENCHMARKS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_program_has_help(path):
    if "hf" in path.name or path.stem in ("bone_finetuning", "tiny_llama"):
        pytest.importorskip("trl")
    out, _ = finish(start([sys.executable, str(path), "--help"]))
    assert re.search("^usage: ", out, re.MULTILINE)
