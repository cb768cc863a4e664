"""Settings files: flags in YAML or JSON, by name. `--config FILE` reads one, `--write_config FILE` writes one.

A value is text as on the command line, a list for a flag of several values, a mapping for a flag that takes JSON, and
true or false for a flag without a value; null stands for a flag that is not given. config.json of a run is one, too,
because it holds the run's flags as "flags".
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...checkpoints.atomic import atomic_write
from ...checkpoints.readable import read_short, require_readable
from ...cli.errors import UNREADABLE, UserError, short, told
from ...cli.parser import Parser
from ...cli.rules import Refusals
from .parser import READ, WRITE, entries_of

FLAGS = "flags"  # the flags of a run, in its config.json
SIZE, DEPTH = 1 << 20, 8  # of a file: bytes, and collections within each other
NULL, TEXT, LIST, MAP = (f"tag:yaml.org,2002:{name}" for name in ("null", "str", "seq", "map"))
UNTOLD = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # the other surrogates are bytes of names that are no UTF-8
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def expanded(words: Sequence[str], parser: Parser) -> list[str]:
    """Put the flags of the file that --config names in its place before the words of a command line, but for those that
    stand there by any of their names. Raises UserError for a file that cannot be read, and for all of its keys that are
    unknown, set twice or of no sense."""
    actions = parser._option_string_actions
    given = entries_of(words, actions)
    name = given.get(READ[2:])
    if not isinstance(name, str):
        return list(words)
    place = max(position for position, word in enumerate(words) if word.partition("=")[0] == READ)
    words = [*words[:place], *words[place + 1 + (words[place] == READ) :]]
    overruled = {actions[f"--{flag}"].dest for flag in given}
    refusals, found, seen = Refusals(), list[str](), dict[str, str]()
    for key, node in settings_in(Path(name)):
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
                found += refusals.attempt(words_of, flag, actions[flag], node, name) or []
    refusals.tell()
    return [*found, *words]


def settings_in(path: Path) -> Iterator[tuple[str, yaml.Node]]:
    """Yield (key, value) of a file of settings, or of the flags in the config.json of a run."""
    try:
        require_readable(path, f"{READ} {path} is not there; name a file of settings", again=True)
        text = read_short(path, SIZE, f"{READ} {path}")
        require_plain(path, text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where is not None else ""
        raise UserError(f"{READ} {path} is no YAML{line}: {told(error)}; write a line `flag: value` a flag") from error
    for key, value in pairs_of(path, node):
        if key == FLAGS and isinstance(value, yaml.MappingNode):
            yield from pairs_of(path, value)
            return
    yield from pairs_of(path, node)


def require_plain(path: Path, text: str) -> None:
    """Raise UserError for aliases and for more than DEPTH collections within each other, which may fill memory, and for
    characters that no command line can hold."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        what = "an alias" if isinstance(event, yaml.AliasEvent) else f"a level below {DEPTH} others" * (depth > DEPTH)
        if isinstance(event, yaml.ScalarEvent) and UNTOLD.search(event.value):
            what = "a character that no name has"
        if what:
            raise UserError(f"{READ} {path}: {what} in line {event.start_mark.line + 1}; write plain values")


def pairs_of(path: Path, node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{READ} {path} holds no flags; write a line `flag: value` a flag")
    return [(str(key.value), value) for key, value in node.value]


def words_of(flag: str, action: argparse.Action, node: yaml.Node, name: str) -> list[str]:
    """The words of a flag and its value on a command line; [] for a value that means it is not given."""
    if node.tag == NULL:
        return []
    if isinstance(node, yaml.MappingNode):
        try:
            return [f"{flag}={json.dumps(yaml.safe_load(yaml.serialize(node)))}"]
        except (yaml.YAMLError, *UNREADABLE) as error:  # a date, or a tag that names no kind
            raise UserError(
                f"{READ} {name}: {flag[2:]} holds what JSON has not: {told(error)}; write plain values"
            ) from None
    several = isinstance(node, yaml.SequenceNode)
    values = [str(value.value) for value in (node.value if several else [node])]
    if several and not all(isinstance(value, yaml.ScalarNode) for value in node.value):
        raise UserError(f"{READ} {name}: {flag[2:]} holds lists within a list; give a list of plain values")
    if action.nargs == 0:
        if several or values[0].lower() not in TRUE + FALSE:
            raise UserError(
                f"{READ} {name}: {flag[2:]} is {short(str(values))}, and takes no value; give true or false"
            )
        return [flag] * (values[0].lower() in TRUE)
    if several and action.nargs is None:
        raise UserError(f"{READ} {name}: {flag[2:]} is a list, and the flag takes one value; give that")
    return [f"{flag}={values[0]}"] if action.nargs is None else [flag, *values]


def write(path: Path, entries: Mapping[str, Any]) -> None:
    """Write the flags of a command line as a settings file."""
    nodes = [(plain(flag), plain(value)) for flag, value in entries.items()]
    with atomic_write(path) as temporary:
        text = yaml.serialize(yaml.MappingNode(MAP, nodes), Dumper=yaml.SafeDumper, allow_unicode=True, width=SIZE)
        temporary.write_text(text, "utf-8")


def plain(value: str | bool | list[str]) -> yaml.Node:
    """A value as on a command line, without quotes unless YAML needs them."""
    if isinstance(value, list):
        return yaml.SequenceNode(LIST, [plain(each) for each in value], flow_style=True)
    text = str(value).lower() if isinstance(value, bool) else value
    tag = yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False)) if text else TEXT
    return yaml.ScalarNode(tag, text)
