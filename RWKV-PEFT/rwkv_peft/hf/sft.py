"""trl's SFTConfig and SFTTrainer, which here take the argument names of older scripts too, such as Bone's quick start.

    from rwkv_peft.hf.sft import SFTConfig, SFTTrainer      # instead of: from trl import …

Until trl 0.12, `processing_class` was called `tokenizer` and `max_length` was called `max_seq_length`, and settings of
the data (`dataset_text_field`, `packing`, …) were arguments of the trainer; now they are SFTConfig's.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import trl
from transformers import TrainingArguments

NEW_NAMES = MappingProxyType({"tokenizer": "processing_class", "max_seq_length": "max_length"})
SETTINGS = ("max_length", "dataset_text_field", "dataset_num_proc", "dataset_kwargs", "packing", "model_init_kwargs")


class SFTConfig(trl.SFTConfig):
    """trl.SFTConfig that takes `max_seq_length` as `max_length`. Raises TypeError if both are given."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **_renamed(settings))


class SFTTrainer(trl.SFTTrainer):
    """trl.SFTTrainer that takes `tokenizer` as `processing_class`, and moves settings of the data into `args`, which
    may be a TrainingArguments. Raises TypeError if an old name and its new one are both given."""

    def __init__(self, model: Any, args: TrainingArguments | None = None, *more: Any, **arguments: Any) -> None:
        arguments = _renamed(arguments)
        settings = {name: arguments.pop(name) for name in SETTINGS if name in arguments}
        super().__init__(model, _with_settings(args, settings), *more, **arguments)


def _renamed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    for old, new in NEW_NAMES.items():
        if old in arguments and new in arguments:
            raise TypeError(f"{old}= is the older name of {new}=, and both are given; leave {old} out")
    return {NEW_NAMES.get(name, name): value for name, value in arguments.items()}


def _with_settings(args: TrainingArguments | None, settings: Mapping[str, Any]) -> TrainingArguments | None:
    """Return a copy of args (SFTConfig, TrainingArguments or None) with the settings in it; args if there are none."""
    if not settings:
        return args
    if args is None:
        args = trl.SFTConfig()
    elif not isinstance(args, trl.SFTConfig):
        theirs = {field.name: getattr(args, field.name) for field in fields(TrainingArguments) if field.init}
        known = {field.name for field in fields(trl.SFTConfig)}
        args = trl.SFTConfig(**{name: value for name, value in theirs.items() if name in known})
    args = copy.copy(args)
    for name, value in settings.items():
        setattr(args, name, value)
    return args
