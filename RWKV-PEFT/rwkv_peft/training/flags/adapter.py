"""Make an AdapterConfig of the flags on what trains: single flags and the JSON values of RWKV-PEFT's scripts.

Flags and keys come from the table of methods and their settings in config/adapter.py.
"""

import argparse
import difflib
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from ...cli.errors import UserError, short, summarize
from ...cli.names import STATE_PARTS, is_finite
from ...config import WORDS, AdapterConfig, forms
from ...config.adapter import JSON_FLAGS, LEFT, PEFT_FLAG, refusal_of, words_with

Keys = tuple[tuple[str, str], ...]  # (key of a JSON form, AdapterConfig field)


def add_json_flags(parser: argparse._ArgumentGroup) -> None:
    """Add the flags that take settings as one JSON value."""
    for flag in JSON_FLAGS:
        parser.add_argument(
            f"--{flag.name}",
            default=None,
            metavar="JSON",
            help=f"settings of {', '.join(words_with(flag.json_flag))} as one JSON value: {flag.example}",
        )
    parser.add_argument(
        f"--{PEFT_FLAG}",
        default=None,
        metavar="JSON",
        help='settings of any --peft under their names above, its rank also as r: {"r":8,"lora_alpha":32}',
    )


def json_flags(peft: str) -> Iterator[tuple[str, tuple[str, ...], Keys]]:
    """Yield (flag, the words of --peft that take it, its keys) of each JSON flag; --peft_config takes peft's keys."""
    peft_keys = dict(WORDS[peft].keys) if peft in WORDS else {}
    for flag in JSON_FLAGS:
        takers = words_with(flag.json_flag)
        keys = flag.keys or tuple(pair for word in takers for pair in WORDS[word].keys)
        if peft in takers:
            peft_keys |= keys
        yield flag.name, takers, tuple(dict(keys).items())
    yield PEFT_FLAG, tuple(WORDS), tuple((peft_keys | {"r": "rank"}).items())


def check_adapter_flags(args: argparse.Namespace) -> Iterator[str]:
    """Yield refusals of flags that do not go with the given --peft."""
    for flag, words in (*single_flags(), *((flag, words) for flag, words, _ in json_flags(args.peft))):
        if getattr(args, flag) is not None and args.peft not in words:
            yield f"--{flag} belongs to --peft {' or '.join(words)}, and --peft is {args.peft}"


def single_flags() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (flag, the words of --peft that take it) of the flags that hold one setting of a method."""
    flags = dict.fromkeys(flag for word in WORDS.values() for _, flag in word.flags)
    for flag in flags:
        yield flag, tuple(name for name, word in WORDS.items() if flag in dict(word.flags).values())


def parts_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The parts that --train_parts names, each once."""
    return tuple(dict.fromkeys(part for group in args.train_parts for part in group))


def adapter_config(args: argparse.Namespace) -> AdapterConfig:
    """Make the AdapterConfig from single flags and JSON values."""
    values: dict[str, Any] = {name: getattr(args, flag) for word in WORDS.values() for name, flag in word.flags}
    values["targets"] = None if args.target_modules is None else tuple(args.target_modules)
    for flag, _, keys in json_flags(args.peft):
        if (text := getattr(args, flag)) is None:
            continue
        # The same setting may stand in a single flag and in the JSON of RWKV-PEFT's scripts: equal, or refused.
        for key, value in parse_json_flag(flag, text, keys).items():
            if value == "" and values.get(key):
                continue  # scripts write "bone_load":"" if they name none
            if values.get(key) and values[key] != value:
                raise UserError(
                    f"--{flag} says {key} {value!r} and a single flag says {values[key]!r}; give one of them"
                )
            values[key] = value
    settings = {key: value for key, value in values.items() if value is not None}
    if "mode" in settings and settings["mode"] not in forms(args.peft):
        if settings["mode"] in LEFT:
            raise UserError(f"bone_mode {settings['mode']}: {refusal_of(settings['mode'])}")
        raise UserError(
            f"bone_mode {settings['mode']!r} does not exist; take {', '.join(forms(args.peft))}, or bat, which is "
            "bat-in"
        )
    given_parts = tuple(part for part in STATE_PARTS if part in args.state_parts)
    return AdapterConfig(
        method=args.peft, train_parts=parts_of(args), state_parts=given_parts, quant=args.quant, **settings
    )


def parse_json_flag(flag: str, text: str, keys: Keys) -> dict[str, Any]:
    """Parse the JSON value of --flag -> {AdapterConfig field: value}."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--{flag} {short(text)!r} is not JSON ({summarize(error)}); quote it for the shell, "
            f"e.g. --{flag} '{{\"{keys[0][0]}\": …}}'"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"--{flag} must be a JSON object, not {short(text)!r}")
    known = dict(keys)
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(
                f"--{flag} has the unknown key {short(key)!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
            )
    return {known[key]: json_setting(flag, key, known[key], item) for key, item in value.items()}


def json_setting(flag: str, key: str, field: str, item: Any) -> Any:
    """Check one entry of a JSON flag -> the value of AdapterConfig's field. Raises UserError if it does not fit."""
    types: dict[str, Any] = {f.name: f.type for f in fields(AdapterConfig)}
    readers = {f.name: f.metadata["read"] for word in WORDS.values() for f in fields(word.settings) if f.metadata}
    wanted = types[field] if types[field] in (int, float) else str
    kinds: Any = (int, float) if wanted is float else wanted
    # In Python a bool is an int, and true is no rank.
    if isinstance(item, bool) or not isinstance(item, kinds):
        raise UserError(f"--{flag}: {key} {item!r} has the wrong type")
    if wanted is float and not is_finite(item):
        raise UserError(f"--{flag}: {key} {item} is not a finite number")
    read = readers.get(field)
    return item if read is None else read(f"--{flag}: {key}", item)
