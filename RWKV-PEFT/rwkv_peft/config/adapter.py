"""Settings of the adapter that trains and of the parameters beside it; the table of the values of --peft, and the
methods behind each.

Flags are checked by it before torch is imported. A method lies in the file of adapters/ of its name; its settings are
the fields of a class below: each holds its default, its flag with help or its key in a JSON flag, and its rule.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, NamedTuple

from ..cli.errors import UserError
from ..cli.names import NONE, STATE, STATE_PARTS
from ..cli.parser import above_zero, alias, names, positive
from .setting import Condition, setting

MODE_ALIASES = (("bat", "bat-in"),)  # RWKV-PEFT's name for it
METHOD_ALIASES = (("disha", "bone"),)
# methods and modes that left -> what to take
LEFT = MappingProxyType(
    dict.fromkeys(("vera", "shira"), "--peft lora of a small rank") | {"bat-in-scaled": "--bone_mode bone-signed"}
)
MINI = "bone-mini"  # the form with a mini_rank
PEFT_FLAG = "peft_config"  # takes the JSON keys of the method that --peft names
SIZES = ("rank", "mini_rank")  # settings that give the shapes of tensors


GOOD_FOR = MappingProxyType(  # value of --peft -> what trains, and when to take it
    {
        "bone": "one small block for each layer, guided by the weight (begin with it)",
        "lora": "two thin factors, which most other tools know, at a larger rate",
        "lora-plus": "lora whose second factor learns faster",
        "rslora": "lora with a scale that suits large ranks, 128 and more",
        "dora": "lora that also learns the length of each row, in more time",
        "pissa": "lora that starts at the weight's largest singular values, to learn faster at first",
        "olora": "lora that starts at the weight's QR decomposition, for the same end",
        "lora-ga": "lora that starts along the first gradient, for which it reads some rows before",
        NONE: "no adapter, the model itself (all of it, or --train_parts), in the most memory",
    }
)


def whole_from(least: int, words: str) -> Condition:
    return Condition(lambda value: value >= least, words)


def read_alpha(name: str, value: Any) -> Any:
    if value <= 0:
        raise UserError(
            f"{name} {value} must be above 0, since {name.split()[-1]} / lora_r multiplies the adapter's product; "
            f"leave {name.split()[-1]} out for a scale of 1"
        )
    return value


def read_parts(name: str, text: str) -> tuple[str, ...]:
    """Read RWKV-PEFT's parts of a block with adapters on their linear layers, "att,ffn" -> ("att", "ffn")."""
    parts = names(text)
    if not parts or not set(parts) <= {"att", "ffn"}:
        raise UserError(
            f"{name} {text!r} may name att and ffn, which get adapters; what trains along is named by --train_parts, "
            "and single layers by --target_modules"
        )
    return tuple(dict.fromkeys(parts))


def refusal_of(name: str) -> str:
    """The refusal of a method or mode that left, as a clause."""
    return f"version 0.3.0 is the last that trains {name}; take {LEFT[name]}"


@dataclass(frozen=True)
class Settings:
    """The settings of a value of --peft, `method`; targets are as in AdapterConfig."""

    method: str = setting(
        "bone",
        f"adapter method. {'; '.join(f'{name}: {words}' for name, words in GOOD_FOR.items())}. RWKV-PEFT's miss is "
        "bone with --bone_mode bone, and its state is --train_type state (default: bone; none for a new model and with "
        "--train_type finetune or state)",
        flag="peft",
        unset=True,
        type=alias(METHOD_ALIASES),
    )
    targets: tuple[str, ...] = ()


RANK = whole_from(1, "a rank is at least 1; try 64")
ALPHA = Condition(
    lambda value: math.isfinite(value) and value >= 0, "it is a finite number above 0, or 0 for that of the rank"
)


def adapter_setting(key: str) -> str:
    """The field of the adapter to start from, which --adapter names, or `key` in the method's JSON flag."""
    options: dict[str, Any] = {"aliases": ("bone_load",), "key": key, "unset": True, "metavar": "FILE"}
    return setting("", "adapter to start from", flag="adapter", **options)


@dataclass(frozen=True)
class BoneSettings(Settings):
    mode: str = setting(
        "bat-in",
        "bat-in (block affine by input block, also called bat), bat-out, bone, bone-mini or bone-signed (default "
        "bat-in)",
        flag="bone_mode",
        key="bone_mode",
        read=lambda name, value: alias(MODE_ALIASES)(value),
        unset=True,
        type=alias(MODE_ALIASES),
        metavar="MODE",
    )
    rank: int = setting(
        64,
        "block size r (default 64); for the bat modes it divides all dimensions",
        flag="bone_r",
        key="bone_r",
        rule=RANK,
        unset=True,
        type=positive,
    )
    load: str = adapter_setting("bone_load")
    mini_rank: int = setting(
        0,
        "bone-mini: width of its (bone_r, bone_mini_r) matrix, which repeats over a layer's outputs and divides their "
        "number",
        flag="bone_mini_r",
        key="bone_mini_r",
        unset=True,
        type=positive,
    )


@dataclass(frozen=True)
class LoraSettings(Settings):
    """alpha is the scale times the rank (0: a scale of 1); dropout hides inputs from the adapter."""

    rank: int = setting(64, key="lora_r", rule=RANK)
    alpha: float = setting(0.0, key="lora_alpha", rule=ALPHA, read=read_alpha)
    dropout: float = setting(
        0.0, key="lora_dropout", rule=Condition(lambda value: 0 <= value < 1, "it is a probability below 1")
    )
    load: str = adapter_setting("lora_load")
    targets: tuple[str, ...] = setting((), key="lora_parts", read=read_parts)


@dataclass(frozen=True)
class LoraPlusSettings(LoraSettings):
    lora_plus_ratio: float = setting(
        16.0,
        "lora-plus: learning rate of lora_B over lora_A's (default 16)",
        flag="loraplus_lr_ratio",
        rule=Condition(lambda value: math.isfinite(value) and value > 0, "it is a finite number above 0; try 16"),
        unset=True,
        type=above_zero,
    )


@dataclass(frozen=True)
class PissaSettings(Settings):
    """init is the file of the first factors of RWKV-PEFT's `load`; svd_niter the iterations of a randomized SVD."""

    rank: int = setting(64, key="pissa_r", rule=RANK)
    load: str = adapter_setting("pissa_load")
    init: str = setting("", key="pissa_init")
    alpha: float = setting(0.0, rule=ALPHA)  # which RWKV-PEFT's PiSSA lacks, and so no flag gives
    svd_niter: int = setting(
        4, key="svd_niter", rule=whole_from(0, "0 asks for an exact SVD, 4 for a quick one; none is below 0")
    )
    targets: tuple[str, ...] = setting((), key="pissa_parts", read=read_parts)


@dataclass(frozen=True)
class MethodSettings(BoneSettings, LoraPlusSettings, PissaSettings):
    """The settings of all methods. Each reads its own; fields of one name are one setting."""


class Word(NamedTuple):
    """A value of --peft: the methods that it stands for, the flag that takes their settings as JSON, the settings."""

    name: str
    forms: tuple[str, ...]
    json_flag: str
    settings: type[Any]

    @property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """The (key of the JSON flag, field) pairs."""
        return tuple((f.metadata["key"], f.name) for f in fields(self.settings) if f.metadata.get("key"))

    @property
    def flags(self) -> tuple[tuple[str, str], ...]:
        """The (field, flag) pairs of settings that have a flag of their own."""
        return tuple(
            (f.name, f.metadata["flag"]) for f in fields(self.settings) if f.name != "method" and f.metadata.get("flag")
        )

    @property
    def sizes(self) -> tuple[str, ...]:
        """The keys of the settings that give the shapes of the tensors."""
        return tuple(key for key, field in self.keys if field in SIZES)

    def takes(self, name: str) -> bool:
        """Return True if a field of AdapterConfig is one of the settings."""
        return any(field.name == name for field in fields(self.settings))

    def flag_of(self, name: str) -> str:
        """The words in which people give a setting: "--bone_r", or "lora_r in --lora_config"; "" if no flag does."""
        metadata = next(field.metadata for field in fields(self.settings) if field.name == name)
        key = f"{metadata['key']} in --{self.json_flag}" if metadata["key"] else ""
        return f"--{metadata['flag']}" if metadata["flag"] else key


BONE = ("bone", "bone-mini", "bone-signed", "bat-in", "bat-out")
WORDS: Mapping[str, Word] = MappingProxyType(
    {
        word.name: word
        for word in (
            Word("bone", BONE, "bone_config", BoneSettings),
            Word("lora", ("lora",), "lora_config", LoraSettings),
            Word("lora-plus", ("lora-plus",), "lora_config", LoraPlusSettings),
            Word("rslora", ("rslora",), "lora_config", LoraSettings),
            Word("dora", ("dora",), "lora_config", LoraSettings),
            Word("pissa", ("pissa",), "pissa_config", PissaSettings),
            Word("olora", ("olora",), "lora_config", LoraSettings),
            Word("lora-ga", ("lora-ga",), "lora_config", LoraSettings),
        )
    }
)
CHOICES = (*WORDS, NONE)  # the values of --peft


class JsonFlag(NamedTuple):
    """A flag that takes settings as one JSON value: the json_flag of the words that take it, an example, and further
    keys with their fields ((): those of the words)."""

    name: str
    json_flag: str
    example: str
    keys: tuple[tuple[str, str], ...] = ()


JSON_FLAGS = (
    JsonFlag("bone_config", "bone_config", '{"bone_mode":"bat-in","bone_load":"","bone_r":64}'),
    JsonFlag(
        "disha_config",
        "bone_config",
        '{"mode":"bat","load":"","r":64}',
        (("mode", "mode"), ("r", "rank"), ("load", "load")),
    ),
    JsonFlag("lora_config", "lora_config", '{"lora_load":"","lora_r":64,"lora_alpha":128,"lora_dropout":0}'),
    JsonFlag("pissa_config", "pissa_config", '{"pissa_load":"","pissa_init":"","pissa_r":64,"svd_niter":4}'),
)


def forms(peft: str) -> tuple[str, ...]:
    """The names of the methods behind a value of --peft; () for another word."""
    return WORDS[peft].forms if peft in WORDS else ()


def words_with(json_flag: str) -> tuple[str, ...]:
    """The values of --peft with settings from a JSON flag."""
    return tuple(word.name for word in WORDS.values() if word.json_flag == json_flag)


def problems(config: MethodSettings, peft: str) -> Iterator[str]:
    """Yield the problems of the settings of a value of --peft: values against their rules, and settings of other words,
    which would do nothing; only a size may stay from another method."""
    word = WORDS[peft]
    for field in fields(word.settings):
        rule, value = field.metadata.get("rule"), getattr(config, field.name)
        if rule is not None and not rule.holds(value):
            flag, key = field.metadata["flag"], field.metadata["key"]
            yield f"{f'--{flag}' if flag else key or field.name} {value}: {rule.words}"
    for field in fields(MethodSettings):
        if field.name in SIZES or word.takes(field.name):
            continue
        if getattr(config, field.name) != field.default:
            takers = " or ".join(other.name for other in WORDS.values() if other.takes(field.name))
            value = getattr(config, field.name)
            yield f"{field.name} {value} belongs to --peft {takers}, and --peft is {peft}; leave it out"


QUANTIZATIONS = ("none", "nf4", "int8")


@dataclass(frozen=True)
class AdapterConfig(MethodSettings):
    """The adapter, the linear layers that get it, and the other parameters that train.

    method is a value of --peft (methods.py), and mode one of its forms if it has several; method "none" has no adapter:
    the model itself trains, or train_parts. targets are module-name suffixes such as "att.key", () all that the
    generation has. The other fields are the method's own settings.
    """

    targets: tuple[str, ...] = setting(
        (),
        "linear layers that get an adapter, as ends of their names (default: all of a block)",
        flag="target_modules",
        unset=True,
        metavar="NAME",
    )
    train_parts: tuple[str, ...] = setting(
        (),
        "also train these: time ln emb head are parameters of the base; state is the states before the first token "
        "(--state_parts), which start at zero or from --state_load",
        nargs="*",
        type=names,
        metavar="PART",
    )
    state_parts: tuple[str, ...] = setting(
        ("wkv",),
        "parts of the states that --train_parts state trains: wkv (default), shift, the input of each mix before the "
        "first token, or both; RWKV-Runner, Ai00 and the rwkv package start from wkv alone, rwkv-peft from both",
        choices=tuple(STATE_PARTS),
    )
    quant: str = setting("none", "keep the frozen matrices quantized (needs bitsandbytes)", choices=QUANTIZATIONS)

    @property
    def states_alone(self) -> bool:
        """True if only time states train."""
        return self.method == NONE and self.train_parts == (STATE,)

    @property
    def whole_model(self) -> bool:
        """True if a run writes a model: no layer has an adapter, and parameters of the model itself train."""
        return self.method == NONE and not self.states_alone
