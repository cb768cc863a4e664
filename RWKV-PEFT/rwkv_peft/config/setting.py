"""What a field of the settings says of its flag."""

from dataclasses import field
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
    """A field that a flag sets: default, the flag's help, its name where it is not the field's, the group of --help
    that it stands in, and argparse's options. With unset the flag's default is None, which stands for what the help
    says. Without help the field has no flag of its own."""
    metadata = {"help": help, "flag": flag, "group": group, "unset": unset, "options": options}
    return field(default=default, metadata=metadata)
