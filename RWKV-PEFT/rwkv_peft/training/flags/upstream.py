"""Read the flags that only RWKV-LM's and RWKV-PEFT's scripts have as the flags that mean the same here.

RWKV-LM trains whole models in stages. --train_stage 1 writes a new model, PROJ_DIR/rwkv-init.pth; stages 2 and 3 train
the newest rwkv-N.pth there, or rwkv-init.pth, or a new model if there is neither. Its epochs are 40,320 samples each. A
run ends at --my_exit_tokens, or without it after as many epochs as --magic_prime holds.
"""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ...cli import count, counted
from ...names import NONE, STATE

INIT = "rwkv-init.pth"
SAVED = re.compile(r"rwkv-(init|\d{1,9})\.pth")
EPOCH = 40320  # samples
PLACEHOLDER = "0"  # --load_model in scripts whose stage chooses the model
MISS = "miss"  # RWKV-PEFT's later word for bone
WORDS = (MISS, STATE)  # further values of --peft


def add_upstream_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("flags of RWKV-LM's scripts, which set others")
    group.add_argument(
        "--train_stage",
        "--my_pile_stage",
        type=count,
        choices=range(4),
        default=0,
        help=f"1: write a new model, {INIT}, to --proj_dir and end; 2 and 3: train the newest rwkv-N.pth there, else "
        f"{INIT}, else a new model. All of them mean --peft none",
    )
    group.add_argument(
        "--my_exit_tokens",
        type=count,
        default=0,
        help="train on so many tokens in all: sets --epoch_steps and --epoch_count, and --lr_schedule rwkv-lm unless "
        "that is given",
    )
    group.add_argument(
        "--magic_prime",
        type=count,
        default=0,
        help=f"with --train_stage and without --my_exit_tokens: train on so many samples, in epochs of {EPOCH:,}; "
        "the order of the data needs no such number here",
    )


def check_stage(args: argparse.Namespace) -> Iterator[str]:
    """Yield the refusal of a --train_stage 1 that would overwrite a model."""
    if args.train_stage == 1 and os.path.lexists(path := Path(args.proj_dir) / INIT):
        yield f"--train_stage 1 would overwrite {path}; delete it for another model, or go on with --train_stage 3"


def adopt(args: argparse.Namespace) -> list[str]:
    """Set the flags that a script means in a parsed command line -> notes that tell what was set."""
    notes = []
    if args.load_model == PLACEHOLDER:
        args.load_model = ""
    if args.train_stage:
        args.peft = args.peft or NONE
    if args.train_stage > 1 and not args.load_model:
        args.load_model = newest_model(Path(args.proj_dir))
        source = args.load_model or f"no rwkv-N.pth or {INIT} is in --proj_dir: a new model"
        notes.append(f"--train_stage {args.train_stage}: all of the model trains, from {source}")
    if args.peft == MISS:
        args.peft, args.bone_mode = "bone", args.bone_mode or "bone"
    if args.peft == STATE:
        args.peft, args.train_type = NONE, STATE
    if steps := total_steps(args):
        epoch = max(1, EPOCH // step_samples(args)) if args.train_stage else args.epoch_steps
        args.save_every = args.save_every or (args.epoch_save or 0) * epoch
        args.epoch_steps, args.epoch_count = steps, 1
        args.lr_schedule = args.lr_schedule or "rwkv-lm"
        often = f", a save every {args.save_every:,}" if args.save_every else ""
        notes.append(f"--{'my_exit_tokens' if args.my_exit_tokens else 'magic_prime'}: {counted(steps, 'step')}{often}")
    return notes


def newest_model(folder: Path) -> str:
    """The path of the rwkv-N.pth with the highest N in a folder, else of rwkv-init.pth, else ""."""
    found = [match for name in (os.listdir(folder) if folder.is_dir() else ()) if (match := SAVED.fullmatch(name))]
    newest = max(found, key=lambda match: -1 if match[1] == "init" else int(match[1]), default=None)
    return str(folder / newest[0]) if newest else ""


def step_samples(args: argparse.Namespace) -> int:
    """The number of samples in an optimizer step."""
    groups = max(1, args.devices * args.num_nodes // args.context_parallel)
    return args.micro_bsz * groups * args.accumulate_grad_batches


def total_steps(args: argparse.Namespace) -> int:
    """The steps that --my_exit_tokens or --magic_prime asks for; 0 if neither does."""
    if args.my_exit_tokens:
        return -(-args.my_exit_tokens // (args.ctx_len * step_samples(args)))
    if args.train_stage and args.magic_prime:
        return max(1, args.magic_prime // EPOCH * (EPOCH // step_samples(args)))
    return 0
