"""The table of commands: `rwkv-peft COMMAND …`, or `python -m rwkv_peft COMMAND …`.

A command is a module with main(argv) -> exit code, which is imported when it is called and not before.
"""

import difflib
import importlib
from typing import NamedTuple

from . import __version__
from .errors import UserError, exit_on_user_error


class Command(NamedTuple):
    """module is where its main is, needs the file of requirements that it takes besides requirements.txt, or ""."""

    name: str
    text: str
    module: str
    needs: str = ""


COMMANDS = (
    Command("preprocess", "text and chat files -> token files (.bin, .idx, .mask)", "data.preprocess"),
    Command("tokenize", "print the token ids of a text, as --mask_id takes them", "data.tokenizer"),
    Command("train", "train an adapter on a model, or the model itself (train.py)", "training.run"),
    Command("plot", "draw the loss curve of a run", "plots"),
    Command("merge", "base + adapter -> a .pth that any runtime loads (merge_bone.py)", "release.merge_command"),
    Command("check", "a merged model against base + adapter, and in the rwkv package", "release.check"),
    Command("verify", "a model in every installed runtime, against float64", "release.verify"),
    Command("convert", "models, states and adapters to and from other tools' formats", "release.convert"),
    Command("generate", "continue prompts with a model, merged or with adapters", "generate.command"),
    Command("bone2miss", "a BONE adapter folder of peft -> a MISS one, and back", "hf.folders", "requirements-hf.txt"),
    Command("doctor", "what this machine can do, what is missing, what mends it", "doctor"),
)


def usage() -> str:
    """What `rwkv-peft --help` prints."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:<{width}}  {command.text}" for command in COMMANDS]
    return "\n".join(
        ["usage: rwkv-peft COMMAND [arguments]", "", *lines, "", "rwkv-peft COMMAND --help tells the rest of each."]
    )


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
        near = difflib.get_close_matches(argv[0], known, 1)
        raise UserError(
            f"there is no command {argv[0]}" + (f"; did you mean {near[0]}?" if near else "; see rwkv-peft --help")
        )
    command = known[argv[0]]
    try:
        # inside, because a main imports what it alone needs when it needs that
        return importlib.import_module(f".{command.module}", __package__).main(argv[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__):
            raise
        files = " -r ".join(filter(None, ("requirements.txt", command.needs)))
        raise UserError(
            f"{error}; activate the environment (. .venv/bin/activate), or pip install -r {files}"
        ) from error


def run() -> None:
    """The console script rwkv-peft."""
    exit_on_user_error(main)
