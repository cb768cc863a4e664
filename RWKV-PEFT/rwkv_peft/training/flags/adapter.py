"""Make an AdapterConfig of the flags that say what trains: single flags and the JSON values of RWKV-PEFT's scripts."""

import argparse
import difflib
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from ...cli import alias, names
from ...config import MODE_ALIASES, AdapterConfig
from ...errors import UserError, short, told
from ...names import CHOICES, MINIS, NONE, forms, words_with

Keys = tuple[tuple[str, str], ...]  # (key of a JSON form, AdapterConfig field)

LORA_KEYS = (
    ("lora_r", "rank"),
    ("lora_alpha", "alpha"),
    ("lora_dropout", "dropout"),
    ("lora_load", "load"),
    ("lora_parts", "targets"),
)
PISSA_KEYS = (
    ("pissa_r", "rank"),
    ("pissa_load", "load"),
    ("pissa_init", "init"),
    ("svd_niter", "svd_niter"),
    ("pissa_parts", "targets"),
)
BONE_KEYS = (("bone_mode", "mode"), ("bone_r", "rank"), ("bone_load", "load"), ("bone_mini_r", "mini_rank"))
# (flag, the json_flag of the words of --peft that take it (names.py), its keys -> AdapterConfig fields, an example)
JSON_FLAGS = (
    ("bone_config", "bone_config", BONE_KEYS, '{"bone_mode":"bat-in","bone_load":"","bone_r":64}'),
    (
        "disha_config",
        "bone_config",
        (("mode", "mode"), ("r", "rank"), ("load", "load")),
        '{"mode":"bat","load":"","r":64}',
    ),
    ("lora_config", "lora_config", LORA_KEYS, '{"lora_load":"","lora_r":64,"lora_alpha":128,"lora_dropout":0}'),
    ("pissa_config", "pissa_config", PISSA_KEYS, '{"pissa_load":"","pissa_init":"","pissa_r":64,"svd_niter":4}'),
)
# --peft_config takes the JSON keys of the method that --peft names, and its rank as r, as Hugging Face peft does
PEFT_FLAG = "peft_config"
# (a single flag, the only word of --peft that takes it)
SINGLE_FLAGS = (
    ("bone_mode", "bone"),
    ("bone_r", "bone"),
    ("bone_mini_r", "bone"),
    ("bone_load", "bone"),
    ("loraplus_lr_ratio", "lora-plus"),
)


def add_json_flags(parser: argparse._ArgumentGroup) -> None:
    """Add the flags that take settings as one JSON value."""
    for flag, json_flag, _, example in JSON_FLAGS:
        parser.add_argument(
            f"--{flag}",
            default=None,
            metavar="JSON",
            help=f"settings of {', '.join(words_with(json_flag))} as one JSON value: {example}",
        )
    parser.add_argument(
        f"--{PEFT_FLAG}",
        default=None,
        metavar="JSON",
        help='settings of any --peft under their names above, the rank also as r: {"r":8,"lora_alpha":32}',
    )


def json_flags(peft: str) -> Iterator[tuple[str, tuple[str, ...], Keys]]:
    """Yield (flag, the words of --peft that take it, its keys) of each flag with a JSON value; peft is the word given,
    whose keys --peft_config takes."""
    for flag, json_flag, keys, _ in JSON_FLAGS:
        yield flag, words_with(json_flag), keys
    own = [pair for _, json_flag, keys, _ in JSON_FLAGS for pair in keys if peft in words_with(json_flag)]
    yield PEFT_FLAG, tuple(word for word in CHOICES if word != NONE), tuple(dict([*own, ("r", "rank")]).items())


def check_adapter_flags(args: argparse.Namespace) -> Iterator[str]:
    """Yield refusals of flags that do not go with the given --peft."""
    if args.peft == NONE and args.target_modules is not None:
        yield (
            f"--target_modules {' '.join(args.target_modules)} names layers that get an adapter, and --peft none has "
            "none; choose what trains with --train_parts, or name a --peft"
        )
    for flag, word in SINGLE_FLAGS:
        if getattr(args, flag) is not None and args.peft != word:
            yield f"--{flag} belongs to --peft {word}, and --peft is {args.peft}"
    for flag, words, _ in json_flags(args.peft):
        if getattr(args, flag) is not None and args.peft not in words:
            yield f"--{flag} belongs to --peft {' or '.join(words)}, and --peft is {args.peft}"
    if args.quant != "none" and args.peft == NONE:
        yield f"--quant {args.quant} keeps weights that adapters leave frozen, and --peft none has none"


def parts_of(args: argparse.Namespace) -> tuple[str, ...]:
    """The parts that --train_parts names, each once."""
    return tuple(dict.fromkeys(part for group in args.train_parts for part in group))


def adapter_config(args: argparse.Namespace) -> AdapterConfig:
    """Make the AdapterConfig from single flags and JSON values. Raises UserError if they contradict each other or do
    not fit the method."""
    given: dict[str, Any] = {
        "mode": args.bone_mode,
        "rank": args.bone_r,
        "mini_rank": args.bone_mini_r,
        "load": args.bone_load,
        "lora_plus_ratio": args.loraplus_lr_ratio,
        "targets": None if args.target_modules is None else tuple(args.target_modules),
    }
    for flag, _, keys in json_flags(args.peft):
        if (text := getattr(args, flag)) is None:
            continue
        for key, value in parse_json_flag(flag, text, keys).items():
            if value == "" and given.get(key):
                continue  # scripts write "bone_load":"" if they name none
            if given.get(key) and given[key] != value:
                raise UserError(
                    f"--{flag} says {key} {value!r} and a single flag says {given[key]!r}; give one of them"
                )
            given[key] = value
    settings = {key: value for key, value in given.items() if value is not None}
    if "mode" in settings and settings["mode"] not in forms(args.peft):
        raise UserError(
            f"bone_mode {settings['mode']!r} does not exist; take {', '.join(forms(args.peft))}, or bat, which is "
            "bat-in"
        )
    adapter = AdapterConfig(method=args.peft, train_parts=parts_of(args), quant=args.quant, **settings)
    if adapter.mini_rank and adapter.mode not in MINIS:
        minis = " or ".join(MINIS)
        raise UserError(
            f"--bone_mini_r {adapter.mini_rank} belongs to --bone_mode {minis}, and the mode is {adapter.mode}; "
            "give that mode, or leave bone_mini_r out"
        )
    if adapter.init and not adapter.load:
        raise UserError(
            f"pissa_init {adapter.init} is what the run that wrote pissa_load began with, and pissa_load is not "
            "given; name that adapter, or leave pissa_init out for a new start"
        )
    return adapter


def parse_json_flag(flag: str, text: str, keys: Keys) -> dict[str, Any]:
    """Parse the JSON value of --flag -> {AdapterConfig field: value}. Raises UserError for mistakes such as an unknown
    key."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--{flag} {short(text)!r} is not JSON ({told(error)}); quote it for the shell, "
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
    wanted = str if field == "targets" else types[field]
    kinds: Any = (int, float) if wanted is float else wanted
    if isinstance(item, bool) or not isinstance(item, kinds):
        raise UserError(f"--{flag}: {key} {item!r} has the wrong type")
    if wanted is float and not abs(item) <= sys.float_info.max:  # false for NaN too, which json reads
        raise UserError(f"--{flag}: {key} {item} is not a finite number")
    if field == "alpha" and item <= 0:
        raise UserError(
            f"--{flag}: {key} {item} must be above 0, since {key} / lora_r multiplies the adapter's product; "
            f"leave {key} out for a scale of 1"
        )
    if field == "mode":
        return alias(MODE_ALIASES)(item)
    return parts_targets(flag, key, item) if field == "targets" else item


def parts_targets(flag: str, key: str, text: str) -> tuple[str, ...]:
    """Parse RWKV-PEFT's parts of a block, "att,ffn" -> ("att", "ffn"), whose linear layers get adapters. Raises
    UserError for other parts."""
    parts = names(text)
    if not parts or not set(parts) <= {"att", "ffn"}:
        raise UserError(
            f"--{flag}: {key} {text!r} may name att and ffn, which get adapters; what trains along is named by "
            "--train_parts, and single layers by --target_modules"
        )
    return tuple(dict.fromkeys(parts))
