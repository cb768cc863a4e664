"""Build the parser of train.py from the fields of the settings (config/), and print its flags as Markdown.

python -m rwkv_peft.training.flags.parser > docs/reference/flags.md
"""

import argparse
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields
from types import MappingProxyType
from typing import Any, TypeVar

from ...cli.names import TRAIN_TYPES, generation
from ...cli.parser import FLAG, HelpFormatter, Parser, count, positive, switch, up_to
from ...cli.tables import GENERATIONS
from ...config import CHOICES, AdapterConfig, DataConfig, Objective, TrainConfig
from ...config.rules import RULES as SETTINGS_RULES
from ...config.setting import flag_of
from ...config.train import MachineSettings, ModelSettings, OptimizerConfig, RunSettings, ValidationConfig
from ...objectives import FLAGS as OBJECTIVE_FLAGS
from ...objectives import OBJECTIVES
from ...objectives import RULES as OBJECTIVE_RULES
from .adapter import add_json_flags
from .legacy import SEVERAL, SYNONYMS, VALUES, WORDS, add_legacy_flags, add_upstream_flags, marker

Settings = TypeVar("Settings", bound=AdapterConfig | DataConfig | TrainConfig | Objective)
OPTIONS = (("peft", "choices", (*CHOICES, *WORDS)), ("mask_id", "type", marker))  # those that config/ does not know
GROUPS = (
    ("validation", ValidationConfig),
    ("run", RunSettings),
    ("optimizer", OptimizerConfig),
    ("machine", MachineSettings),
)
RULES = (*SETTINGS_RULES, *OBJECTIVE_RULES)  # of flags that do not go together
DIMENSIONS = (
    ("n_layer", "blocks"),
    ("n_embd", "channels"),
    ("vocab_size", "vocabulary"),
    ("dim_att", "attention channels (new model: n_embd)"),
    ("dim_ffn", "feed-forward channels (new model: 3.5 n_embd down to a multiple of 32, RWKV-7 4 n_embd)"),
    ("head_size", "head size (new model: 64)"),
)
LAYERS, WIDTH = 1000, 1 << 20  # of a new model, at most: it is made, or planned, tensor by tensor
OTHER_VERSIONS = ("x052", "x051")
SHORT = MappingProxyType({generation(version).removeprefix("RWKV-"): version for version in GENERATIONS})
HEAD = """# Flags of train.py

Made by `python -m rwkv_peft.training.flags.parser` of the settings in `rwkv_peft/config/`; `python train.py --help`
shows the same. An unknown flag is refused with the nearest that exists.
"""
FIRST = (  # those that most runs give
    *("load_model", "data_file", "data_type", "proj_dir", "peft", "bone_r", "ctx_len", "micro_bsz", "lr_init"),
    *("epoch_count", "grad_cp", "val_split", "merge_on_save", "resume", "devices"),
)
LONG = 260  # characters of a help that a cell of the table holds whole
READ, WRITE = "--config", "--write_config"  # the files of settings to read and to write (settings_file.py)
Actions = Mapping[str, argparse.Action]  # those of a parser, by each name of their flags
Entries = dict[str, str | bool | list[str]]  # flags without their dashes, and their values


def build_parser() -> Parser:
    """Build the parser, with its flags grouped as --help shows them."""
    versions = tuple(GENERATIONS)
    names = " or ".join(map(generation, versions))
    parser = Parser(
        prog="train.py",
        usage="train.py --load_model MODEL --data_file PREFIX [flags]",
        formatter_class=HelpFormatter,
        synonyms=SYNONYMS,
        values=VALUES,
        several=SEVERAL,
        description=f"Train an {names} model, or a Bone adapter on one, on CPUs or GPUs.",
    )
    model = parser.add_argument_group("model")
    add_settings(model, fields(ModelSettings))
    model.add_argument(
        "--model_version",
        "--generation",
        type=version,
        default=None,
        choices=versions,
        help=f"architecture of a new model, {' or '.join(SHORT)} for short (default {versions[0]}); that of a base is "
        "in its file",
    )
    model.add_argument(
        "--my_testing",
        "--rwkv_version",
        type=version,
        default=None,
        choices=versions,
        help="the same in RWKV-LM's and RWKV-PEFT's scripts: of a base its file counts, with a note if they differ",
    )
    for name, text in DIMENSIONS:
        flags = ["--head_size", "--head_size_a"] if name == "head_size" else [f"--{name}"]
        # RWKV-PEFT's scripts write 0 for widths that follow from others
        kind = count if name in ("dim_att", "dim_ffn") else positive
        model.add_argument(*flags, type=up_to(LAYERS if name == "n_layer" else WIDTH, kind), default=None, help=text)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--train_type",
        choices=TRAIN_TYPES,
        default=TRAIN_TYPES[0],
        help="RWKV-PEFT's word for what trains: finetune is --peft none, state is --peft none --train_parts state, "
        "which then may be left out; "
        "infctx: rows of any length, in segments whose states are carried over (--chunk_ctx)",
    )
    add_settings(adapter, fields(AdapterConfig))
    add_json_flags(adapter)
    data = parser.add_argument_group("data")
    add_settings(data, fields(DataConfig))
    data.add_argument(
        "--data_shuffle",
        type=switch,
        default=True,
        metavar="0|1",
        help="0: samples come in the order of the file, in every epoch",
    )
    minimized = parser.add_argument_group("objective")
    texts = "; ".join(f"{name}: {each.text} (rows: {', '.join(each.rows)})" for name, each in OBJECTIVES.items())
    minimized.add_argument(
        "--objective",
        choices=tuple(OBJECTIVES),
        default=None,
        help=f"what a step minimizes. {texts} (default: the first that learns from the --data_type)",
    )
    add_settings(minimized, OBJECTIVE_FLAGS.values())
    for name, settings in GROUPS:
        group = parser.add_argument_group(name)
        add_settings(group, fields(settings))
        if name == "run":
            group.add_argument(
                "--check_flags",
                action="store_true",
                help="say whether these flags can work together, with the base and on this machine, and end; the data "
                "is not read",
            )
            group.add_argument(
                "--config",
                metavar="FILE",
                help="take flags from a YAML file, such as `bone_r: 64`, or from a run's config.json; those of the "
                "command line win",
            )
            group.add_argument(
                "--write_config",
                metavar="FILE",
                help="write these flags to a file for --config, if they can work, and end",
            )
    add_upstream_flags(parser)
    add_legacy_flags(parser)
    parser.check_rules(RULES)
    return parser


parser_of_train = functools.cache(build_parser)  # for those who add no flags; parsing leaves it as it is


def version(text: str) -> str:
    """Parse a --model_version or the number of a generation (an argparse type) -> the version. The error for one that
    is not supported gives its name, if there is one."""
    if text in (*GENERATIONS, *SHORT):
        return SHORT.get(text, text)
    known = " or ".join(f"{known} ({generation(known)})" for known in GENERATIONS)
    if text in OTHER_VERSIONS:
        raise argparse.ArgumentTypeError(f"{text} is {generation(text)}, which is not supported yet; there is {known}")
    raise argparse.ArgumentTypeError(f"{text!r} names no generation; there is {known}, {' or '.join(SHORT)} for short")


def add_settings(parser: argparse._ArgumentGroup, settings: Iterable[Field[Any]]) -> None:
    """Add the flags of fields of settings to a parser."""
    for field in settings:
        if (flag := flag_of(field)) is None:
            continue
        options = field.metadata["options"] | {option: value for name, option, value in OPTIONS if name == flag}
        if "required" not in options:
            many = options.get("nargs") in ("*", "+")
            default: Any = field.default
            options["default"] = None if field.metadata["unset"] else list(default) if many else default
        names = [f"--{name}" for name in (flag, *field.metadata["aliases"])]
        parser.add_argument(*names, help=field.metadata["help"], **options)


def settings_of(args: argparse.Namespace, config: type[Settings], **others: Any) -> Settings:
    """Build a settings dataclass from parsed flags; `others` are the fields that are not simply a flag's value. A flag
    that was not given leaves the field's default."""
    values: dict[str, Any] = {}
    for field in fields(config):
        flag = flag_of(field)
        value = getattr(args, flag, None) if flag else None
        if value is not None:
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return config(**values | others)


def table() -> str:
    """Every flag with its default and help, as Markdown, after the few that most runs give. Long helps go on below
    their group's table: a list of the values, and one of the rules."""
    groups = {
        str(group.title): [a for a in group._group_actions if a.dest != "help" and a.help != argparse.SUPPRESS]
        for group in parser_of_train()._action_groups
    }
    known = {action.dest: action for actions in groups.values() for action in actions}
    lines = [HEAD]
    for title, members in {"the first flags": [known[name] for name in FIRST], **groups}.items():
        if members:
            lines += [f"## {title}", "", "| flag | values | default | what it does |", "|---|---|---|---|"]
            lines += [*map(row, members), ""]
            if title in groups:
                lines += [line for action in members for line in details(action)]
    return "\n".join(lines)


def row(action: argparse.Action) -> str:
    """A flag's row of the table."""
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    shown = action.default not in (None, "", False, []) and action.nargs != 0
    default = f"`{int(action.default) if action.default is True else action.default}`" if shown else ""
    values = ", ".join(map(str, action.choices)) if action.choices and not action.metavar else ""
    text, below, rules = parted(action)
    text = f"{text} ([more](#{action.dest}-more))" if below or rules else text
    return f"| {names} | {values} | {default} | {text} |".replace("  ", " ")


def details(action: argparse.Action) -> list[str]:
    """The lines below the table on a flag with a long help."""
    _, values, rules = parted(action)
    lines = [*values, *rules]
    return [f"### {action.dest}: more", "", *(f"- {line}" for line in lines), ""] if lines else []


def parted(action: argparse.Action) -> tuple[str, list[str], list[str]]:
    """(what a flag does, what each value means, which flags go with it) of its help: all in the first if that is not
    LONG."""
    text = str(action.help).replace("|", "\\|")
    if len(text) <= LONG:
        return text, [], []
    match = re.fullmatch(r"(.*?)(?: \[(.{60,})\])?", text, re.DOTALL)  # shorter rules stay
    assert match is not None
    text, rules = match[1], match[2].split("; ") if match[2] else []
    each = "|".join(map(re.escape, sorted(map(str, action.choices or ()), reverse=True)))
    head, *values = re.split(rf"(?:^|(?<=[.;:] ))(?=(?:{each}): )", text) if each else [text]
    if len(values) < 2:
        return "".join([head, *values]), [], rules
    end = re.search(r" \(default|\. |$", values[-1])
    assert end is not None
    text, values[-1] = head.rstrip(" .:") + values[-1][end.start() :], values[-1][: end.start()]
    return text, [re.sub(r"^(.*?): ", r"`\1`: ", value.rstrip("; ")) for value in values], rules


if __name__ == "__main__":
    print(table(), end="")


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
