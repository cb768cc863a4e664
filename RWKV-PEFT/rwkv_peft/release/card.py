"""The card of an adapter or a model: a README.md that describes the files, their making and their use.

A run writes one beside its adapter when it ends; a push makes one for a file without.
"""

from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType

from ..checkpoints.adapters import AdapterSource
from ..checkpoints.atomic import write_text
from ..cli.errors import UserError
from ..cli.names import ADAPTER, CARD, MODEL, TUNED
from ..data.recorded import flags_beside
from .inspect import ADAPTER as IS_ADAPTER
from .inspect import SHIFTED, STATES, Line, contents_of

MARK = "<!-- Written by rwkv-peft, which replaces this file unless this line is taken away. -->"
USE = MappingProxyType(
    {  # commands of rwkv-peft
        ADAPTER: (
            "python merge_bone.py --base_model BASE.pth --bone_checkpoint {name} --output merged.pth",
            "rwkv-peft generate --model BASE.pth --adapter {name} {asked}",
        ),
        TUNED: ("rwkv-peft generate --model BASE.pth --state {name} {asked}",),
        MODEL: ("rwkv-peft generate --model {name} {asked}",),
    }
)


def card_of(title: str, files: Iterable[Path], figures: Iterable[Line] = ()) -> str:
    """The text of a card about files. It describes the first; figures are further (name, value) lines."""
    first, *_ = paths = list(files)
    contents = contents_of(AdapterSource(first))
    kind = ADAPTER if contents.what == IS_ADAPTER else TUNED if contents.what in (STATES, SHIFTED) else MODEL
    return text_of(title, kind, [path.name for path in paths], [*contents.lines, *figures], flags_beside(first))


def text_of(title: str, kind: str, names: list[str], lines: Iterable[Line], asked: str) -> str:
    """The text of a card: kind is the first file's, ADAPTER, TUNED or MODEL; asked are generate's flags."""
    tags = ["rwkv", "rwkv-peft", *(["adapter"] if kind == ADAPTER else [])]
    rows = [f"| {name} | {cell(value)} |" for name, value in lines]
    others = f"Beside it: {', '.join(f'`{name}`' for name in names[1:])}.\n\n" if names[1:] else ""
    commands = "\n".join(command.format(name=names[0], asked=asked) for command in USE[kind])
    return (
        f"---\ntags: [{', '.join(tags)}]\n---\n{MARK}\n# {cell(title)}\n\n`{names[0]}`:\n\n| | |\n|---|---|\n"
        + "\n".join(rows)
        + f"\n\n{others}## Use\n\n```sh\n{commands}\n```\n"
    )


def cell(text: str) -> str:
    """A text in a cell of a table, as which Markdown and HTML show it letter by letter."""
    for sign in "\\`*_|[]":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")


def write_card(folder: Path, text: str) -> bool:
    """Write the card of a folder, unless a README.md of someone else is there -> whether it was written."""
    path = folder / CARD
    if path.exists() and not is_own(path):
        return False
    write_text(path, text)
    return True


def is_own(path: Path) -> bool:
    """True if a file is a card that still has the mark; a user takes it away to keep the text."""
    try:
        return MARK in path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); move it away") from error
