"""Fields of the settings that hold the description of their flag."""

from collections.abc import Callable
from dataclasses import Field, field
from typing import Any, NamedTuple, TypeVar

from ..cli.parser import switch

Value = TypeVar("Value")


class Condition(NamedTuple):
    """A condition on a value, and the words of a message if it does not hold."""

    holds: Callable[[Any], bool]
    words: str


def setting(
    default: Value,
    help: str | None = None,
    *,
    flag: str | None = None,
    aliases: tuple[str, ...] = (),
    key: str | None = None,
    unset: bool = False,
    rule: Condition | None = None,
    read: Callable[[str, Any], Any] | None = None,
    **options: Any,
) -> Value:
    """Make a dataclass field that a flag sets: its default, the flag's help, the flag's name if it is not the field's,
    its other names, and argparse's options, some of which follow from the default: a tuple takes one value or more, and
    False none. With unset the flag's default is None, explained in its help. Without help the field has no flag.

    key is the field's name in a JSON flag, and read(name, value) turns a value from there into the field's, or raises
    UserError. rule holds of every value."""
    if isinstance(default, tuple):
        options = {"nargs": "+"} | options
    elif options.get("type") is switch:
        options = {"metavar": "0|1"} | options
    elif default is False:
        options = {"action": "store_true"}
    metadata = {"help": help, "flag": flag, "aliases": aliases, "unset": unset, "options": options}
    return field(default=default, metadata=metadata | {"key": key, "rule": rule, "read": read})


def flag_of(setting: Field[Any]) -> str | None:
    """The name of a setting's flag, None if it has none of its own."""
    return None if setting.metadata.get("help") is None else setting.metadata["flag"] or setting.name
