"""The flags of `rwkv-peft compare`, checked before torch is imported: argv -> a Comparison."""

import argparse
import json
from dataclasses import dataclass, replace

from ...cli.errors import UserError
from ...cli.names import NONE, STATE
from ...cli.parser import Parser, count, not_negative, positive, seed
from ...cli.rules import EXCLUDES, NEEDS, Given, Rule, contradictions, require_none
from ...config import MINI, WORDS, forms
from ...config.rules import values_of
from ...objectives import OBJECTIVES
from ...training.flags.request import Flags
from ...training.flags.request import parse_flags as parse_train_flags
from .sweep import grid_rate

FULL = "full"  # the method that trains the model itself
RANKLESS = (FULL, STATE)  # the model alone gives their number of parameters
METHODS = (*(form for word in WORDS for form in forms(word)), *RANKLESS)
SEEDS = (42, 43, 44)
VAL_SEED = SEEDS[0]  # --val_seed of all runs by default, so that runs of all seeds validate on the same samples
PROG = "rwkv-peft compare"
OTHERS = "|".join(name for name, objective in OBJECTIVES.items() if not objective.of_tokens)
RULES = (  # of its own flags and those of train.py
    Rule(PROG, NEEDS, "--val_data, --val_split", "methods are compared by that loss", "add one of them after --"),
    Rule(
        PROG,
        EXCLUDES,
        f"--objective {OTHERS}",
        "it goes by the validation loss, and for preferences a broken model has the lowest",
        "compare on answers, or train each method by itself and ask the models",
    ),
    Rule(
        f"--methods {'|'.join(RANKLESS)}", EXCLUDES, "--train_parts", "that would change what the method itself trains"
    ),
)
# flags of train.py that differ from run to run, or follow from the flags of the comparison
OURS = tuple(
    """peft peft_config bone_mode bone_r bone_mini_r adapter bone_load bone_config disha_config lora_config pissa_config
    lr_init lr_final random_seed proj_dir output resume fresh_optimizer epoch_steps epoch_count epoch_begin epoch_save
    train_stage my_pile_stage my_exit_tokens val_every early_stop check_flags show_samples""".split()
)
USAGE = """Compare adapter methods on a model and data of yours, at about as many trained parameters each.

    rwkv-peft compare --output out/compare --methods bat-in bone lora pissa --rank 64 --steps 1000 -- \\
        --load_model base.pth --data_file data/mine --val_split 0.01 --ctx_len 1024 --micro_bsz 8

The flags after -- are train.py's, the same for all runs; the parameters of --train_parts there come on top. Each method
sweeps the learning rate with the first seed, widening the sweep until its best rate is between two worse ones, and
repeats the best one with the other seeds. A seed means the same order of the data for every method, and all runs
validate on the same samples. Runs are processes with folders in DIR/runs; the same command continues where it stopped.
It writes table.md, results.jsonl and comparison.png to DIR, and after Ctrl-C the results so far.
--retain_data PREFIX after -- also measures the loss on that data and its change: how much each method forgets.
"""


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison. rates are numbers of the grid (sweep.py), () for three around Bone's automatic
    rate; rank is the first method's; train are the flags of train.py that all runs share; lr_final is a share of
    each run's rate."""

    output: str
    methods: tuple[str, ...]
    rank: int
    rates: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: int
    val_every: int
    lr_final: float
    train: tuple[str, ...]


def build_parser() -> Parser:
    parser = Parser(
        prog=PROG,
        usage="rwkv-peft compare --output DIR [flags] -- [flags of train.py]",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        synonyms={"--budget_minutes": "`timeout -s INT 10h rwkv-peft compare …`, which also reports"},
    )
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder of the runs, the table and the picture")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        default=["bat-in", "bone", "lora", "pissa"],
        help=f"some of {', '.join(METHODS)} (default bat-in bone lora pissa)",
    )
    add(
        "--rank",
        type=positive,
        default=64,
        help="rank of the first method; the others get the rank with the nearest number of parameters (default 64)",
    )
    add(
        "--rates",
        nargs="+",
        type=grid_rate,
        default=[],
        metavar="LR",
        help="learning rates that every method begins with, 1 or 3 times a power of ten (default: three around that "
        "of --lr_init auto for Bone: 3e-4 1e-3 3e-3 at 64 and 128 channels, 1e-5 3e-5 1e-4 at 2048 and 4096)",
    )
    add(
        "--seeds",
        nargs="+",
        type=seed,
        default=list(SEEDS),
        metavar="SEED",
        help="the seeds themselves, not their number; the first one sweeps (default 42 43 44)",
    )
    add("--steps", type=positive, default=1000, help="optimizer steps of each run (default 1000)")
    add("--val_every", type=count, default=0, help="steps between validations; 0: at most ten validations")
    add(
        "--lr_final",
        type=not_negative,
        default=0.1,
        metavar="SHARE",
        help="learning rate at the end of a run, as a share of its rate (default 0.1)",
    )
    parser.check_rules(RULES)
    return parser


def parse_flags(argv: list[str]) -> Comparison:
    """argv -> Comparison. Raises UserError for flags, train.py's too, that are wrong or contradict each other."""
    own, train = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = build_parser().parse_args(own)
    if not train:
        raise UserError(
            "the flags of train.py are missing: give them after --, as in `rwkv-peft compare --output out/compare -- "
            "--load_model base.pth --data_file data/mine --val_split 0.01`"
        )
    for word in train:
        if word.startswith("--") and word[2:].split("=")[0] in OURS:
            raise UserError(f"{word} after --: the comparison sets it for each run; leave it out")
    if args.methods[0] in (*RANKLESS, MINI):
        raise UserError(
            f"--methods {' '.join(args.methods)}: --rank is that of the first, and a rank does not determine "
            f"{args.methods[0]}; put another method first"
        )
    args.methods, args.seeds = tuple(dict.fromkeys(args.methods)), tuple(dict.fromkeys(args.seeds))
    args.rates, args.val_every = tuple(sorted(set(args.rates))), args.val_every or -(-args.steps // 10)
    comparison = Comparison(**vars(args), train=tuple(train))
    for method in comparison.methods:
        flags = parse_train_flags([*train, "--proj_dir", args.output, *method_flags(method)])
    require_none(contradictions, RULES, given(comparison, flags))
    if flags.train.val_split and flags.train.val_seed is None:
        return replace(comparison, train=(*train, "--val_seed", str(VAL_SEED)))
    return comparison


def given(comparison: Comparison, flags: Flags) -> Given:
    """The values for RULES: the comparison's methods, and the flags of train.py that all runs share."""
    parts = any(word.split("=")[0] == "--train_parts" for word in comparison.train)
    own = {PROG: True, "methods": comparison.methods, "train_parts": parts}
    values = values_of(flags.train, flags.objective) | own
    return Given(values, {name for name in (PROG, "val_data", "val_split", "train_parts") if values[name]})


def method_flags(method: str, *sizes: int) -> list[str]:
    """The flags of train.py that choose a method, with its sizes in the order of its settings; 0 is left out."""
    if method in RANKLESS:
        return ["--peft", NONE, *(("--train_parts", STATE) if method == STATE else ())]
    word = next(word for word in WORDS if method in forms(word))
    settings: dict[str, str | int] = {"bone_mode": method} if len(forms(word)) > 1 else {}
    settings |= {key: size for key, size in zip(WORDS[word].sizes, sizes) if size}
    return ["--peft", word, "--peft_config", json.dumps(settings)]
