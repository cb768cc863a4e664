"""Find every contradiction among the settings of how a run trains and writes."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from ...config import AdapterConfig, TrainConfig
from ...files.readable import home_meant
from ...names import FINETUNE, NONE, STATE
from ..saving.loggers import check_wandb
from .adapter import parts_of
from .questions import check_questions


def check_train_type(args: Namespace) -> Iterator[str]:
    """Yield refusals of a --train_type that contradicts what trains."""
    if args.train_type not in (FINETUNE, STATE):
        return
    what = {FINETUNE: "the model itself", STATE: "the states alone"}[args.train_type]
    if args.peft != NONE:
        yield (
            f"--train_type {args.train_type} trains {what}, and --peft is {args.peft}; leave --peft out"
            + ("" if args.train_type != STATE else ", or give --train_parts state instead to tune them along")
        )
    others = [part for part in parts_of(args) if part != STATE]
    if args.train_type == STATE and others:
        yield f"--train_type state trains {what}, and --train_parts names {others[0]}; leave one of the two out"


def check_products(train: TrainConfig, adapter: AdapterConfig) -> Iterator[str]:
    """Yield refusals of flags about files that the run would not write."""
    full = adapter.whole_model
    if train.merge_on_save and full:
        yield "--merge_on_save merges an adapter, and --peft none has none: rwkv.pth is the model already"
    if train.save_dtype != "keep" and not full and not train.merge_on_save:
        yield (
            f"--save_dtype {train.save_dtype} is the dtype of a model's file, and this run writes an adapter; give "
            "--output_dtype to merge_bone.py, or add --merge_on_save"
        )


def check_train(train: TrainConfig) -> Iterator[str]:
    """Yield the contradictions among the remaining flags."""
    for name in ("beta1", "beta2"):
        if getattr(train, name) >= 1:
            yield f"--{name} {getattr(train, name)} must be below 1"
    if train.compile and train.stage == 3:
        yield (
            f"--compile with --strategy {train.strategy}: stage 3 gathers and frees weights between operations that "
            "would be compiled as one; take stage 1 or 2, or leave --compile out"
        )
    if train.epoch_begin >= train.epoch_count:
        yield (f"--epoch_begin {train.epoch_begin} leaves no epoch of --epoch_count {train.epoch_count} to train")
    if train.fresh_optimizer and not train.resume:
        yield ("--fresh_optimizer says how to --resume, which is not given; a new run has a fresh optimizer anyway")
    if train.val_data and train.val_split:
        yield "--val_data and --val_split both name the validation samples; give one of them"
    if train.val_seed is not None and not train.val_split:
        yield f"--val_seed {train.val_seed} draws what --val_split keeps, which is not given; leave it out"
    validates = bool(train.val_data or train.val_split)
    for name, serves in (("val_every", validates or bool(train.retain_data)), ("early_stop", validates)):
        if getattr(train, name) and not serves:
            yield f"--{name} {getattr(train, name)} needs samples to validate on: --val_data or --val_split"
    yield from check_questions(train)
    if train.wandb:
        yield from check_wandb(train.wandb)
    if not train.proj_dir:
        yield "--proj_dir is empty; name the folder of the run"
        return
    folder = Path(train.proj_dir)
    if meant := home_meant(folder):
        yield f"--proj_dir {folder}: {meant}"
    if folder.exists() and not folder.is_dir():
        yield f"--proj_dir {folder} is a file; name a folder"
