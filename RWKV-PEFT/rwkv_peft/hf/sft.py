"""trl's SFTConfig and SFTTrainer that also take the argument names of older scripts, as the method's quick start is.

    from rwkv_peft.hf.sft import SFTConfig, SFTTrainer      # instead of: from trl import …

Until trl 0.12, `tokenizer` was what is `processing_class` now, `max_seq_length` what is `max_length`, and settings of
the data (`dataset_text_field`, `packing`, …) were the trainer's own arguments, where they are SFTConfig's now.
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
    """trl.SFTConfig, with `max_seq_length` taken as `max_length`; TypeError where both are given."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **_renamed(settings))


class SFTTrainer(trl.SFTTrainer):
    """trl.SFTTrainer, with `tokenizer` taken as `processing_class`, and settings of the data moved into `args`, which
    may be a TrainingArguments; TypeError where an old name and its new one are both given."""

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
    """args (SFTConfig, TrainingArguments or None) with the settings in it; args itself stays as it is."""
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
