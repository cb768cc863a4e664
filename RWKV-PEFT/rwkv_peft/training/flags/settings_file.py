"""Settings files: flags in YAML or JSON, by name. `--config FILE` reads one, `--write_config FILE` writes one.

A value is text as on the command line, a list for a flag of several values, a mapping for a flag that takes JSON, and
true or false for a flag without a value; null stands for a flag that is not given. config.json of a run is one, too: it
holds the run's flags as "flags".
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ...checkpoints.atomic import write_text
from ...checkpoints.readable import reading, require_readable
from ...cli.errors import UserError, short, summarize
from ...cli.parser import Parser
from ...cli.rules import Refusals
from .parser import READ, WRITE, entries_of

FLAGS = "flags"  # the flags of a run, in its config.json
NULL = ("null", "~", "")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def expanded(words: Sequence[str], parser: Parser) -> list[str]:
    """Put the flags of the file that --config names in its place before the words of a command line, but for those that
    stand there by any of their names. Raises UserError for a file that cannot be read; also for all of its keys that
    are unknown, set twice or of no sense."""
    actions = parser._option_string_actions
    entries = entries_of(words, actions)
    name = entries.get(READ[2:])
    if not isinstance(name, str):
        return list(words)
    # The last one counts, as with any flag. Its own flags go to the front, so that words of the line win.
    place = max(position for position, word in enumerate(words) if word.partition("=")[0] == READ)
    words = [*words[:place], *words[place + 1 + (words[place] == READ) :]]
    overruled = {actions[f"--{flag}"].dest for flag in entries}
    refusals, from_file, seen = Refusals(), list[str](), dict[str, str]()
    for key, value in settings_in(Path(name)).items():
        flag = f"--{key.removeprefix('--')}"
        if flag not in actions:
            refusals.add(f"{READ} {name}: {parser.unknown(flag)}")
        elif flag in (READ, WRITE):
            refusals.add(f"{READ} {name}: {key} belongs on the command line; leave it out of the file")
        elif (dest := actions[flag].dest) in seen:
            refusals.add(f"{READ} {name}: {key} sets what {seen[dest]} sets already; leave one of them out")
        else:
            seen[dest] = key
            if dest not in overruled:
                with refusals.collecting():
                    from_file += words_of(flag, actions[flag], value, name)
    refusals.raise_all()
    return [*from_file, *words]


def settings_in(path: Path) -> dict[str, Any]:
    """{key: value} of a file of settings, or of the flags in the config.json of a run: texts as they stand in the file,
    lists, and mappings as JSON, whose values are typed."""
    require_readable(path, f"{READ} {path} is not there; name a file of settings", again=True)
    with reading(path):
        text = path.read_text("utf-8")
        try:
            # Twice: as texts, which argparse parses like words (YAML takes 1e-4 for a text), and typed for JSON values.
            plain, typed = yaml.load(text, yaml.BaseLoader), yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f" in line {mark.line + 1}" if mark is not None else ""
            raise UserError(
                f"{READ} {path} is no YAML{line}: {summarize(error)}; write a line `flag: value` a flag"
            ) from None
        if isinstance(plain, dict) and isinstance(plain.get(FLAGS), dict):
            plain, typed = plain[FLAGS], typed[FLAGS]
        if plain and not isinstance(plain, dict):
            raise UserError(f"{READ} {path} holds no flags; write a line `flag: value` a flag")
        pairs = zip((plain or {}).items(), (typed or {}).values(), strict=True)
        return {  # YAML has numbers that JSON does not write
            key: json.dumps(whole, default=str) if isinstance(whole, dict) else value for (key, value), whole in pairs
        }


def words_of(flag: str, action: argparse.Action, value: Any, name: str) -> list[str]:
    """The words of a flag and its value on a command line; [] for a value that means it is not given."""
    where = f"{READ} {name}: {flag[2:]}"
    if value in NULL:
        return []
    several = isinstance(value, list)
    values = value if several else [value]
    if not all(isinstance(each, str) for each in values):
        raise UserError(f"{where} holds lists within a list; give a list of plain values")
    if action.nargs == 0:
        if several or value.lower() not in TRUE + FALSE:
            raise UserError(f"{where} is {short(str(values))}, and takes no value; give true or false")
        return [flag] * (value.lower() in TRUE)
    if several and action.nargs is None:
        raise UserError(f"{where} is a list, and the flag takes one value; give that")
    return [f"{flag}={values[0]}"] if action.nargs is None else [flag, *values]


def write(path: Path, entries: Mapping[str, Any]) -> None:
    """Write the flags of a command line as a settings file."""
    values = {
        flag: [*map(plain, value)] if isinstance(value, list) else plain(value) for flag, value in entries.items()
    }
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1 << 20))


def plain(value: str | bool) -> str | bool | int | float:
    """A value as YAML writes it without quotes: a number if that is spelled as the text is."""
    number = None
    with suppress(yaml.YAMLError):
        number = yaml.safe_load(value) if isinstance(value, str) else None
    return number if isinstance(number, int | float) and str(number) == value else value
