"""The table of commands: `rwkv-peft COMMAND …`, or `python -m rwkv_peft COMMAND …`.

A command is a module with main(argv) -> exit code, imported only when it is called. If a function checks its flags
without torch, that is called first, so that a mistake, or --help, is answered before torch is imported.
"""

import difflib
import importlib
import sys
from itertools import groupby
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple, NoReturn

from .. import __version__
from ..children import guard_children
from .errors import UserError, exit_on_user_error
from .installing import how_to_install


class Command(NamedTuple):
    """A command: group is the heading of its line in the usage, text the line; module holds its main; flags is
    "module:function" that checks argv without torch, or ""; needs is the extra of pyproject.toml that it takes, or
    ""."""

    group: str
    name: str
    text: str
    module: str
    flags: str = ""
    needs: str = ""


COMMANDS = (
    Command("Data", "download", "download an official base model, from the hub or a mirror", "tools.download"),
    Command(
        "Data",
        "preprocess",
        "text and chat files -> token files (.bin, .idx, .mask)",
        "data.preprocess",
        flags="data.preprocess_flags:parse_flags",
    ),
    Command(
        "Train",
        "plan",
        "show how much memory and disk a run would take, and if it fits",
        "tools.plan.command",
        flags="tools.plan.command:parse_flags",
    ),
    Command(
        "Train",
        "train",
        "train an adapter on a model, or the model itself (train.py)",
        "training.run",
        flags="training.flags.request:check_flags",
    ),
    Command(
        "Train",
        "study",
        "learn a document by questions that the model asks itself, in a state or an adapter",
        "tools.study.command",
        flags="tools.study.flags:parse_flags",
    ),
    Command(
        "Train",
        "learn",
        "learn corrected answers from a run's adapter on, and lose no more than allowed",
        "tools.learn.command",
        flags="tools.learn.flags:parse_flags",
    ),
    Command("Train", "plot", "draw the loss curve of a run, or the curves of several into one picture", "tools.plot"),
    Command(
        "Try",
        "generate",
        "continue prompts, or chat, with a model, merged or with adapters",
        "inference.command",
        flags="inference.flags:parse_flags",
    ),
    Command(
        "Try",
        "serve",
        "answer over HTTP as OpenAI's interface does, with several adapters",
        "inference.serve.app",
        flags="inference.serve.flags:parse_flags",
        needs="serve",
    ),
    Command("Try", "demo", "write a tiny base and rows for it, to try all the other commands with", "tools.demo"),
    Command(
        "Try",
        "ui",
        "open a page in the browser: base, rows, training, talk and release",
        "tools.ui.command",
        flags="tools.ui.flags:parse_flags",
        needs="serve",
    ),
    Command(
        "Measure",
        "eval",
        "score a model on your rows, or on tasks of the lm-evaluation-harness",
        "evals.command",
        flags="evals.flags:parse_flags",
        needs="eval",
    ),
    Command(
        "Release",
        "merge",
        "base + adapter -> a .pth that any runtime loads (merge_bone.py)",
        "release.merge_command",
        flags="release.flags:merge_flags",
    ),
    Command(
        "Release",
        "check",
        "compare a merged model with base + adapter, and in installed runtimes",
        "release.check",
        flags="release.flags:check_flags",
    ),
    Command(
        "Release",
        "prove",
        "write the answers of a run, and name what is wrong at an endpoint that should give them",
        "release.prove",
        flags="release.flags:prove_flags",
    ),
    Command(
        "Release",
        "inspect",
        "show the content of a file, and how far its matrices moved from the base",
        "release.inspect",
        flags="release.flags:inspect_flags",
    ),
    Command(
        "Release",
        "convert",
        "convert models, states and adapters to and from other tools' formats",
        "release.convert",
        flags="release.flags:convert_flags",
    ),
    Command(
        "Release",
        "push",
        "push an adapter or a model to the Hugging Face hub, with a card",
        "release.push",
        flags="release.flags:push_flags",
        needs="hf",
    ),
    Command("Machine", "doctor", "show what this machine can do, what is missing, and the remedy", "tools.doctor"),
)
# {a name of a command in earlier versions or another tool: ours}, whose nearest spelling is another command or none
MEANINGS = MappingProxyType(
    {
        "bone2miss": "convert",
        "chat": "generate --chat",
        "export": "convert",
        "finetune": "train",
        "infer": "generate",
        "lm_eval": "eval",
        "plots": "plot",
        "run": "generate",
        "sft": "train --data_type sft",
        "tokenize": "preprocess --ids --tokenizer",
        "verify": "check --runtimes --merged",
        "version": "--version",
    }
)


def usage() -> str:
    """The text of `rwkv-peft --help`."""
    width = max(len(command.name) for command in COMMANDS)
    lines = ["usage: rwkv-peft COMMAND [arguments]"]
    for group, commands in groupby(COMMANDS, attrgetter("group")):
        lines += ["", group, *(f"  {command.name:<{width}}  {command.text}" for command in commands)]
    lines += ["", "rwkv-peft COMMAND --help describes each; rwkv-peft --version prints the version."]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command that argv names; -> its exit code. Raises UserError for an unknown one."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"rwkv-peft {__version__}")
        return 0
    known = {command.name: command for command in COMMANDS}
    if argv[0] not in known:
        near = [MEANINGS[argv[0]]] if argv[0] in MEANINGS else difflib.get_close_matches(argv[0], known, 1)
        raise UserError(
            f"there is no command {argv[0]}" + (f"; did you mean {near[0]}?" if near else "; see rwkv-peft --help")
        )
    command = known[argv[0]]
    try:
        if command.flags:
            flags, _, check = command.flags.partition(":")
            getattr(importlib.import_module(f"rwkv_peft.{flags}"), check)(argv[1:])
        module = importlib.import_module(f"rwkv_peft.{command.module}")
        return module.main(argv[1:])
    except ModuleNotFoundError as error:
        raise missing(error, command.needs) from error


def missing(error: ModuleNotFoundError, needs: str = "") -> Exception:
    """Return the UserError for a package that this Python lacks; needs as in Command. If a module of our own is
    missing, that is a bug, and `error` itself is returned."""
    package = (error.name or "").split(".")[0]
    if package in ("", "rwkv_peft"):
        return error
    return UserError(f"this Python, {sys.executable}, has no package {package}; {how_to_install(needs)}")


def run(*command: str) -> NoReturn:
    """Run the console script rwkv-peft, and exit; `command` are words put before the command line's."""
    guard_children()
    exit_on_user_error(lambda argv: main([*command, *argv]))
