"""The flags of `rwkv-peft learn`, checked before torch is imported."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...checkpoints.readable import object_in, require_readable
from ...cli.errors import UserError
from ...cli.names import RUN
from ...cli.parser import Parser, above_zero, below_one, not_negative, positive, seed

PROG = "rwkv-peft learn"
USAGE = """Learn corrected answers: go on from the adapter of a run, read some of the run's own rows between them, and
measure what was learned and what was lost.

    rwkv-peft learn out/mine --feedback my-feedback.jsonl
    rwkv-peft learn out/mine --feedback my-feedback.jsonl --keep must-not-be-lost.jsonl --forget_at_most 0.01

RUN is the folder of a run. Better answers and good ones of the feedback are learned; it may be other rows, too, such as
chats. The result is adapter-learned.safetensors in that folder, beside the run's adapter, which stays as it is.
"""


def build_parser() -> Parser:
    parser = Parser(prog=PROG, description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of the run whose adapter goes on")
    add("--load_model", "--model", metavar="MODEL", help="the base, if it is not where the run read it")
    add("--feedback", required=True, metavar="FILE", help="feedback that generate, serve or the page wrote")
    add(
        "--hold_out",
        type=below_one,
        default=0.2,
        metavar="SHARE",
        help="share of the feedback that is not learned but measured, 0 for none (default 0.2)",
    )
    add("--keep", metavar="FILE", help="rows that must not be lost (default: the run's validation rows)")
    add(
        "--forget_at_most",
        type=not_negative,
        default=0.02,
        metavar="NATS",
        help="the most nats a token that those rows may lose; if more is lost, the new part is scaled back to the "
        "largest scale that holds (default 0.02)",
    )
    add("--replay", metavar="FILE", help="rows to read between the feedback (default: those that the run trained on)")
    add(
        "--replay_share",
        type=below_one,
        default=0.5,
        metavar="SHARE",
        help="share of the counted tokens that these rows have (default 0.5)",
    )
    add("--epoch_count", type=positive, default=20, metavar="N", help="times to read the feedback (default 20)")
    add("--micro_bsz", type=positive, default=4, metavar="N", help="rows of a step (default 4)")
    add(
        "--lr_init",
        type=above_zero,
        metavar="RATE",
        help="learning rate (default: a third of train.py's automatic one)",
    )
    add("--minutes", type=above_zero, default=5.0, help="the longest that the steps may take (default 5)")
    add("--random_seed", type=seed, default=42, metavar="N", help="of the rows' order (default 42)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    return parser


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Parse argv -> the flags, with the run's own by name as `settings`. Raises UserError for flags that are mistaken,
    a folder that is no run, and files that are missing."""
    args = build_parser().parse_args(argv)
    settings = object_in(Path(args.run) / RUN).get("flags")
    if not isinstance(settings, dict) or "load_model" not in settings:
        raise UserError(f"{args.run} is no folder of a run that adapted a base: its {RUN} names none; name one")
    for flag in ("feedback", "keep", "replay"):
        if (name := getattr(args, flag)) is not None:
            require_readable(name, f"--{flag} {name}: no such file; it holds rows, such as .jsonl")
    args.settings = settings
    return args
