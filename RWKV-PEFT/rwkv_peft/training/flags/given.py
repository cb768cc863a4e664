"""The flags of a command line as they were given, before any is judged."""

import argparse
from collections.abc import Mapping, Sequence

from ...cli import FLAG

READ, WRITE = "--config", "--write_config"  # the files of settings to read and to write (settings_file.py)

Actions = Mapping[str, argparse.Action]  # those of a parser, by each name of their flags
Entries = dict[str, str | bool | list[str]]  # flags without their dashes, and their values


def entries_of(words: Sequence[str], actions: Actions) -> Entries:
    """The flags among the words of a command line, by the names that stand there, without dashes; of a flag that is
    given twice the last value, as argparse takes it."""
    entries: Entries = {}
    flag = ""
    for word in words:
        name, _, value = word.partition("=")
        if FLAG.match(word) and name in actions:
            action, flag = actions[name], name[2:]
            for other in [each for each in entries if actions[f"--{each}"] is action]:
                del entries[other]
            entries[flag] = True if action.nargs == 0 else [value] if name != word else []
        elif flag and isinstance(values := entries[flag], list):
            values.append(word)
    one = {flag for flag, values in entries.items() if actions[f"--{flag}"].nargs is None and values}
    return {flag: value[-1] if flag in one and isinstance(value, list) else value for flag, value in entries.items()}


def first_of(files: str | list[str] | None) -> tuple[str, tuple[str, ...]]:
    """Part the files of a flag -> (the first or "", the others)."""
    first, *more = [files] if isinstance(files, str) else files or [""]
    return first, tuple(more)
