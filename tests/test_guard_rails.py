"""The table of commands is right: each can be imported and asked for help, and reports a mistake in one line."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.cli import commands
from rwkv_peft.cli.commands import COMMANDS
from rwkv_peft.cli.errors import UserError
from rwkv_peft.cli.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
NAMES = [command.name for command in COMMANDS]
# what the console script does, and the package as a module
ENTRIES = (["-c", "from rwkv_peft.cli.commands import run; run()"], ["-m", "rwkv_peft"])


def ask(entry, *arguments):
    return subprocess.run([sys.executable, *entry, *arguments], capture_output=True, text=True)


def test_the_console_script_is_what_is_tested_here():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^rwkv-peft = "(.*)"$', text, re.MULTILINE) == ["rwkv_peft.cli.commands:run"]


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_each_command_helps(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        commands.main([command.name, "--help"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_help_needs_no_package_and_shows_what_is_required():
    names = [command.name for command in COMMANDS if command.flags]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'RWKV-PEFT')!r})\n"
        "from contextlib import suppress\n"
        "from rwkv_peft.cli.commands import main\n"
        f"for name in {names}:\n"
        "    with suppress(SystemExit):\n"
        "        main([name, '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)  # no site-packages
    assert done.stderr == "" and done.stdout.count("usage: ") >= len(names)
    assert {"check", "convert"} <= set(names)
    assert "[--merged PTH]" not in done.stdout and "--merged PTH" in done.stdout


# flags that mean the same in every command: the base model, adapters on it, its time states, what is written
SAME = {
    "train": "model adapter state output",
    "plan": "model adapter state output",
    "merge": "model adapter state output",
    "check": "model adapter state",
    "generate": "model adapter state output",
    "eval": "model adapter state output",
    "serve": "model adapter state",
    "study": "model output",
    "learn": "model",
    "convert": "model",
    "prove": "model output",
    "doctor": "model",
    "plot": "output",
    "preprocess": "output",
}


class Asked(Exception):
    """Raised when a command calls its parser."""


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_help_has_a_word_on_each_flag_and_its_default_and_names_are_shared(command, monkeypatch):

    def asked(parser, *arguments):
        raise Asked(parser)

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(Parser, name, asked)
    with pytest.raises(Asked) as caught:
        commands.main([command.name])
    (parser,) = caught.value.args
    same = {"model", "adapter", "state", "output"}.intersection(name[2:] for name in parser._option_string_actions)
    assert same == set(SAME.get(command.name, "").split())
    for action in parser._actions:
        assert action.help, f"{action.dest} has no help"
        if action.default and action.default != argparse.SUPPRESS:
            assert "default" in parser._get_formatter()._expand_help(action), f"{action.dest} does not tell its default"


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_each_command_refuses_a_flag_that_it_does_not_have_in_one_message(command, capsys):
    with pytest.raises(UserError):
        commands.main([command.name, "--nosuch", "1"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("entry", ENTRIES, ids=["script", "module"])
def test_help_lists_each_command_and_an_unknown_one_is_refused_with_the_nearest(entry):
    done = ask(entry, "--help")
    assert done.returncode == 0
    for command in COMMANDS:
        lines = done.stdout.partition(f"\n\n{command.group}\n")[2].partition("\n\n")[0]  # those of its group
        assert f"  {command.name} " in lines and command.text in lines
    done = ask(entry, "preproces")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: there is no command preproces; did you mean preprocess?\n"


@pytest.mark.parametrize(
    "name, meant", [("export", "convert"), ("plots", "plot"), ("chat", "generate --chat"), ("version", "--version")]
)
def test_what_other_tools_call_a_command_is_told_by_its_meaning(name, meant):
    with pytest.raises(UserError, match=f"there is no command {name}; did you mean {meant}\\?"):
        commands.main([name])
    assert commands.MEANINGS.keys().isdisjoint(command.name for command in COMMANDS)


def test_an_unknown_command_like_no_other_points_to_help():
    with pytest.raises(UserError, match="there is no command xyzzy; see rwkv-peft --help"):
        commands.main(["xyzzy"])


@pytest.mark.parametrize(
    "name, output, library",
    [
        ("preprocess", "--output", "numpy"),  # missed where the command is imported
        ("plot", "", "matplotlib"),  # missed where it works
    ],
)
def test_a_command_without_its_libraries_says_so_in_one_line(name, output, library, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    code = f"import sys; sys.modules[{library!r}] = None; from rwkv_peft.cli.commands import run; run()"
    files = [str(tmp_path / "metrics.jsonl"), *filter(None, [output]), str(tmp_path / "loss.png")]
    done = ask(["-c", code], name, *files)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert library in done.stderr and done.stderr.endswith("scripts/setup.sh)\n")


def test_a_module_of_our_own_that_is_missing_is_a_mistake_of_ours(monkeypatch):
    monkeypatch.setattr(commands, "COMMANDS", (commands.Command("", "lost", "", "nowhere"),))
    with pytest.raises(ModuleNotFoundError):
        commands.main(["lost"])
