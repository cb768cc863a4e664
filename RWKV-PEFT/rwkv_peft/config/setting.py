"""Fields of the settings that hold the description of their flag."""

from dataclasses import Field, field
from typing import Any, TypeVar

Value = TypeVar("Value")


def setting(
    default: Value,
    help: str | None = None,
    *,
    flag: str | None = None,
    group: str = "",
    unset: bool = False,
    **options: Any,
) -> Value:
    """Make a dataclass field that a flag sets: its default, the flag's help, the flag's name if it is not the field's,
    its group in --help, and argparse's options. With unset the flag's default is None, and its help tells what that
    means. Without help the field has no flag."""
    metadata = {"help": help, "flag": flag, "group": group, "unset": unset, "options": options}
    return field(default=default, metadata=metadata)


def flag_of(setting: Field[Any]) -> str | None:
    """The name of a setting's flag, None if it has none of its own."""
    return None if setting.metadata.get("help") is None else setting.metadata["flag"] or setting.name
