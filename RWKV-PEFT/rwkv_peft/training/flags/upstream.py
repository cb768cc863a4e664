"""Read the flags that only RWKV-LM's and RWKV-PEFT's scripts have as the flags that mean the same here.

RWKV-LM trains whole models in stages. --train_stage 1 writes a new model, PROJ_DIR/rwkv-init.pth; stages 2 and 3 train
the newest rwkv-N.pth there, or rwkv-init.pth, or a new model if there is neither. Its epochs are 40,320 samples each. A
run ends at --my_exit_tokens, or without it after as many epochs as --magic_prime holds.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...cli.errors import UserError, short, told
from ...cli.names import NONE, STATE
from ...cli.numeric import is_whole
from ...cli.parser import count, counted
from .legacy import ignored
from .world import step_samples

INIT = "rwkv-init.pth"
SAVED = re.compile(r"rwkv-(init|\d{1,9})\.pth")
EPOCH = 40320  # samples
PLACEHOLDER = "0"  # --load_model in scripts whose stage chooses the model
MISS = "miss"  # RWKV-PEFT's later word for bone
WORDS = (MISS, STATE)  # further values of --peft
UNSET = MappingProxyType({"mask0": "0", "mask1": "1"})  # what RWKV-PEFT's scripts pass if no marker is meant


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
    """Set the flags that a script means in a parsed command line -> notes on the changes."""
    notes = list(ignored(args))
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


def total_steps(args: argparse.Namespace) -> int:
    """The steps by --my_exit_tokens or --magic_prime; 0 if neither does."""
    if args.my_exit_tokens:
        return -(-args.my_exit_tokens // (args.ctx_len * step_samples(args)))
    if args.train_stage and args.magic_prime:
        return max(1, args.magic_prime // EPOCH * (EPOCH // step_samples(args)))
    return 0


def marker(text: str) -> int | dict[str, Any]:
    """Parse an argument (an argparse type) -> a token id, or the JSON object {"mask0": …, "mask1": …} as a dict."""
    if not text.lstrip().startswith("{"):
        return count(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is not JSON ({told(error)})") from error
    if set(value) != set(UNSET):
        raise argparse.ArgumentTypeError(f"{short(text)!r} has other keys than mask0 and mask1, which are due")
    return value


def markers_of(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return {"mask_id", "mask_end_id": token ids} if --mask_id is the JSON, else {}. Its mask1 opens the part that
    counts, its mask0 closes it. Raises UserError if other markers are given too."""
    given = [item for item in args.mask_id or () if isinstance(item, dict)]
    if not given:
        return {}
    if len(args.mask_id) > 1 or args.mask_end_id:
        named = short(json.dumps(given[0]))
        raise UserError(f"--mask_id {named} names both markers; leave other ids and --mask_end_id out")
    texts = given[0]
    if texts == UNSET:
        return {"mask_id": (), "mask_end_id": ()}
    tokenizer = tokenizer_of(args)
    return {"mask_id": token_ids(texts["mask1"], tokenizer), "mask_end_id": token_ids(texts["mask0"], tokenizer)}


def tokenizer_of(args: argparse.Namespace) -> str:
    """The name of the data's tokenizer: that recorded beside token files, if any, else --tokenizer."""
    from ...data.recorded import recorded_of_data

    recorded = None if args.data_type != "binidx" else recorded_of_data(args.data_file)
    return args.tokenizer if recorded is None else recorded.name


def token_ids(marked: object, tokenizer: str) -> tuple[int, ...]:
    """The ids of one value of the JSON: a text, a token id or a list of ids. Raises UserError for anything else."""
    if isinstance(marked, str):
        from ...data.tokenizer import load_tokenizer

        return tuple(load_tokenizer(tokenizer).encode(marked))
    ids = marked if isinstance(marked, list) else [marked]
    if not all(is_whole(token, 0) for token in ids):
        raise UserError(f"--mask_id: {short(json.dumps(marked))} is neither a text nor token ids")
    return tuple(ids)
