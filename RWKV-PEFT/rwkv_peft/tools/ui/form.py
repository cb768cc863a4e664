"""The flags of commands as fields of forms, made from their parsers, so that a new flag is a new field."""

import argparse
import functools
import re
from collections.abc import Mapping
from typing import Any

from ...cli.parser import switch
from ...config import CHOICES
from ...inference.serve.flags import build_parser as serve_parser
from ...training.flags.legacy import SYNONYMS, VALUES
from ...training.flags.parser import parser_of_train

FIRST = (  # the flags that matter first, in the form's order
    "load_model",
    "data_file",
    "data_type",
    "proj_dir",
    "tokenizer",
    "objective",
    "peft",
    "bone_r",
    "ctx_len",
    "micro_bsz",
    "epoch_count",
    "optim",
    "lr_init",
    "val_split",
    "precision",
    "merge_on_save",
)
CHAT = ("tokenizer", "weights")  # flags of `serve` that a chat offers
PATHS = (  # flags that name a file or folder
    "load_model",
    "data_file",
    "proj_dir",
    "tokenizer",
    "val_data",
    "replay",
    "retain_data",
    "eval_data",
    "adapter",
    "teacher_model",
    "state_load",
)
# the page has its own ways for these, or starts none
LEFT_OUT = ("help", "config", "write_config", "check_flags", "show_samples")
DEFAULT = re.compile(r" \(default:? ([^;,)]+)")  # in the help of a flag whose own default is "not given"
RULES = re.compile(r" \[[^]]*\]$")  # what the help says of other flags: the page shows it as a refusal
FOREIGN = "flags of RWKV-LM"  # how the groups of other tools' flags begin


def form() -> list[dict[str, Any]]:
    """The groups of fields, FIRST's before all others: [{"title", "fields": [field_of's …]}]."""
    groups, first = [], {}
    for group in parser_of_train()._action_groups:
        if group.title is None or group.title.startswith(FOREIGN):
            continue
        fields = []
        for field in map(field_of, group._group_actions):
            if field["flag"] in LEFT_OUT:
                continue
            if field["flag"] in FIRST:
                first[field["flag"]] = field
            else:
                fields.append(field)
        if fields:
            groups.append({"title": group.title, "fields": fields})
    return [{"title": "first", "fields": [first[flag] for flag in FIRST]}, *groups]


def chat_form() -> list[dict[str, Any]]:
    """The fields of CHAT."""
    fields = {field["flag"]: field for field in map(field_of, serve_parser()._actions)}
    return [fields[flag] for flag in CHAT]


def field_of(action: argparse.Action) -> dict[str, Any]:
    """A flag as a field: its name, help, kind (on: given or not; switch: 0 or 1; choice; list; paths; path; text), the
    values of a choice, the help of each, the default as text, and words to find it by."""
    name = next(flag for flag in action.option_strings if flag.startswith("--")).removeprefix("--")
    kind, values = "text", []
    if action.nargs == 0:
        kind = "on"
    elif action.type is switch:
        kind, values = "switch", ["0", "1"]
    elif action.nargs in ("+", "*"):
        kind = "paths" if name in PATHS else "list"
    elif action.choices:
        kind, values = "choice", [str(choice) for choice in (CHOICES if name == "peft" else action.choices)]
    elif name in PATHS:
        kind = "path"
    default, text = action.default, action.help or ""
    text = RULES.sub("", text % vars(action) if "%(" in text else text.replace("%%", "%"))
    told = dict(
        re.findall(rf"(?:^|[;:.] )({'|'.join(map(re.escape, values))}): (.+?)(?=; [\w-]+: |\. | \(default|$)", text)
    )
    return {
        "flag": name,
        "help": around(text, told) if values and len(told) == len(values) else text,
        "kind": kind,
        "values": values,
        "words": told if values else {},
        "default": "" if kind == "on" else default_of(default, text),
        "required": action.required,
        "search": search_words(name),
    }


@functools.cache
def search_words(flag: str) -> str:
    """The names of a train.py flag, and of its values, in other tools, by which somebody may look for it."""
    found = [other for other, ours in SYNONYMS.items() if re.search(rf"--{flag}\b", ours)]
    found += [value for named, value in VALUES if named == f"--{flag}"]
    return " ".join(found).replace("--", "").replace("_", " ")


def default_of(default: Any, text: str) -> str:
    """The default of a flag as text, or from its help if the flag has none."""
    if default is None or default == []:
        said = DEFAULT.search(text)
        return said[1] if said else ""
    return str(int(default) if isinstance(default, bool) else default)


def around(text: str, told: Mapping[str, str]) -> str:
    """Leave the values out of a help if the field shows the help of the chosen value."""
    begin, end = text.find(f"{next(iter(told))}: "), text.rfind(" (default")
    return (text[:begin] + (text[end + 1 :] if end >= 0 else "")).strip()
