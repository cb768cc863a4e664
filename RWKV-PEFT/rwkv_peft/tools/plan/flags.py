"""The flags of the plan: those of train.py, with --data_file optional, and --gpu."""

import argparse
import re

from ...cli.errors import short
from ...cli.refusals import Refusals
from ...cli.rules import EXCLUDES, Rule, contradictions
from ...training.flags.parser import build_parser
from ...training.flags.request import Flags, flags_of, with_settings
from ...training.flags.world import World

PROG = "rwkv-peft plan"
RULES = (
    Rule("--gpu", EXCLUDES, "--accelerator cpu", "it plans for a GPU, and that trains on none"),
    Rule(PROG, EXCLUDES, "--write_config", "a plan writes nothing", "give it to train.py"),
)
LEAST, MOST = 1 << 20, 1 << 40  # bytes of a GPU
UNITS = (("", 30), ("g", 30), ("m", 20))


def parse_flags(argv: list[str]) -> Flags:
    """argv -> Flags. Raises UserError for flags that are mistaken or contradict each other; torch is not imported."""
    parser = build_parser()
    parser.prog, parser.usage = PROG, f"{PROG} [--load_model PTH] [--gpu SIZE] [flags of train.py]"
    parser.description = (
        "Print how much memory and disk a run takes, before it begins. Only the header of --load_model is read; "
        "without it the model is that of --n_layer, --n_embd and --vocab_size. Exit code 1 if the run does not fit."
    )
    for action in parser._actions:
        if action.dest == "data_file":
            action.required, action.default = False, ""
    parser.add_argument(
        "--gpu",
        type=memory_size,
        metavar="SIZE",
        help="plan for a GPU of this memory, such as 24GiB (or 24GB, as its box says), instead of this machine",
    )
    parser.tell(RULES)
    args, mistakes = parser.parse_with_mistakes(with_settings(argv, parser))
    refusals = Refusals(mistakes)
    refusals.gather(contradictions, RULES, parser.given(args))
    world = World(args.num_nodes, args.devices)  # the run may be planned for another machine, however it is started
    return flags_of(args, world, (), refusals, here=False)


class Memory(int):
    """Bytes, told in GiB."""

    def __str__(self) -> str:
        return f"{self / 2**30:g}GiB"


def memory_size(text: str) -> Memory:
    """ "24GiB" -> bytes. Of the unit only the first letter counts: g or m in either case, GiB without one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([gm]?)(?:i?b)?", text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is no size of a memory; write it as 24GiB")
    size = float(found[1]) * 2 ** dict(UNITS)[found[2]]
    if not LEAST <= size <= MOST:
        raise argparse.ArgumentTypeError(f"{short(text)} is no memory of a GPU: 1 MiB to 1,024 GiB")
    return Memory(size)
