"""The flags of `rwkv-peft generate`, checked before torch is imported."""

import argparse
import sys
from collections.abc import Callable, Iterable

from ..checkpoints.source_flags import ScaledFiles, add_source_flags
from ..cli.errors import UserError
from ..cli.names import G1, HERMES, THINK_MODES
from ..cli.parser import Parser, add_stop_flag, count, positive, switch
from ..cli.rules import EXCLUDES, NEEDS, Rule
from .settings import Sampling

PROG = "rwkv-peft generate"
WEIGHTS = ("int8", "int4")
AS_PROMPT = r"""without it, begin the prompt with 'System: TEXT\n\nUser: …\n\nAssistant:', with --escapes"""
RULES = (
    Rule(PROG, NEEDS, "--prompt, --prompt_file, --chat", "it continues what they give", "give one of them"),
    Rule("--prompt, --prompt_file", EXCLUDES, "--chat", "both give prompts"),
    Rule("--prompt", EXCLUDES, "--prompt_file", "both give prompts"),
    Rule("--output", EXCLUDES, "--chat", "a chat is shown as it is written", "redirect the command's output"),
    Rule("--save_state", EXCLUDES, "--chat", "a chat has no end to save", "type /save FILE"),
    Rule("--system", NEEDS, "--chat", "it comes before the first turn", AS_PROMPT),
    Rule("--tools", NEEDS, "--chat", "the first turn lists them", "leave it out"),
    Rule("--feedback", NEEDS, "--chat", "it takes what is said of answers there", "leave it out"),
    Rule("--clean_turns, --tool_form", NEEDS, "--chat", "it is about the turns of one", "leave it out"),
    Rule(
        "--think",
        NEEDS,
        "--chat",
        "it opens answers there",
        "without it, end the prompt with Assistant: <think, or Assistant: <think></think",
    ),
)
# (field of Sampling, type of its flag, help)
SAMPLING = (
    ("temperature", float, "0: always the most probable token"),
    ("top_p", float, "share of the probability to draw from"),
    ("top_k", int, "draw from so many tokens, 0: all"),
    ("presence_penalty", float, "subtract this from the logits of tokens generated before"),
    ("frequency_penalty", float, "subtract this for each time that a token was generated before"),
    ("penalty_decay", float, "multiply those counts by this at each step"),
    ("seed", int, "seed of the draws; prompt i has seed + i"),
)
USAGE = """Continue prompts with an RWKV model.

    rwkv-peft generate --model merged.pth --chat
    rwkv-peft generate --model merged.pth --prompt "Once upon a time"
    rwkv-peft generate --model base.pth --adapter adapter.safetensors --prompt_file questions.jsonl \\
        --output answers.jsonl --temperature 0 --stop "User:"

One prompt streams its continuation to standard output; several are decoded together, and each gives one line of JSON,
in the order of the prompts.
"""


def build_parser() -> Parser:
    parser = Parser(prog=PROG, rules=RULES, description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument
    add(
        "--save_state",
        metavar="PTH",
        help="write the state after the prompt and the printed continuation, without a stop text or the end of the "
        "document",
    )
    add("--chat", action="store_true", help="chat in turns, User: and Assistant:, in the layout of chat data")
    add("--system", metavar="TEXT", help="with --chat: an instruction before the first turn, like System: in chat data")
    add(
        "--tools",
        metavar="JSON|FILE.py:CLASS",
        help="with --chat: a file that lists the tools the model may call, {name, description, parameters} each, or a "
        "class with the tools as methods, as for --environment of train.py, whose calls are run; they come before the "
        "first turn, as in chat data",
    )
    add(
        "--think",
        choices=THINK_MODES,
        help="with --chat, as RWKV-7 G1 is prompted: off opens each answer with <think></think, minimal with an empty "
        "thinking of two lines, on with <think; low, medium and high also end your turns with (think a bit), (think) "
        "and (think a lot)",
    )
    add_feedback_flag(add, "with --chat: append what /fix TEXT, /good and /bad say of answers to this file")
    add("--prompt", nargs="+", metavar="TEXT", help="one prompt or several")
    add(
        "--prompt_file",
        metavar="FILE",
        help='.jsonl (or .ndjson, .jsonl.gz, .json) with a "prompt" in each row, or a text with a prompt in each line; '
        "- reads lines from standard input",
    )
    add(
        "--output",
        metavar="JSONL",
        help="write the lines of JSON to this file instead, each as soon as it is done; at the end, or after Ctrl-C, "
        "they are put in order",
    )
    add("--max_tokens", type=count, default=256, help="the most tokens of a continuation (default 256)")
    add_stop_flag(
        add,
        "texts that end a continuation; default for a prompt that ends in Assistant:, Answer: or Response:, or in "
        "the opening of a thinking after it: the opening of the next turn, such as \\n\\nUser:; with --chat in "
        "addition to it",
    )
    add(
        "--escapes",
        action="store_true",
        help=r"read \n, \t and \\ in --prompt, --system and --stop as newline, tab, backslash",
    )
    add_sampling_flags(parser)
    return parser


def add_feedback_flag(add: Callable[..., object], text: str) -> None:
    add("--feedback", metavar="JSONL", help=f"{text}, as rows to train on: corrections are pairs, marks are labels")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    for name, kind, text in SAMPLING:
        default = getattr(Sampling, name)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default {default:g})")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The Sampling of flags. Raises UserError for a value out of range."""
    return Sampling(**{name: getattr(args, name) for name in Sampling.__dataclass_fields__ if name in args})


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a model, its adapters and state, and of how it runs, the same for every command that runs
    one."""
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="an RWKV model, or its folder from Hugging Face")
    add(
        "--adapter",
        action=ScaledFiles,
        nargs="+",
        default=[],
        metavar="FILE[=SCALE]",
        help="adapters to apply to the model, in order, mine=0.7 for 0.7 times the change; no file is changed",
    )
    add(
        "--state",
        metavar="PTH",
        help="state to start from: time states (.pth, .st, or a run that tuned only them), or a file of --save_state",
    )
    add_running_flags(parser)


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for reading files and running a model."""
    add = parser.add_argument
    add_source_flags(parser)
    add(
        "--clean_turns",
        type=switch,
        metavar="0|1",
        help="remove blank lines from what is not the assistant's in a chat, as from rows (default: as the run did "
        "whose folder holds the adapter or model, else 1)",
    )
    add(
        "--tool_form",
        choices=(G1, HERMES),
        help="the form of tools, calls and results in a chat, as of rows: g1, RWKV-7 G1's own, or hermes (default: "
        f"that of the run whose folder holds the adapter or model, else {G1})",
    )
    add(
        "--any_base",
        action="store_true",
        help="use an adapter or states that were trained on another base of the same shape",
    )
    add(
        "--tokenizer",
        metavar="NAME",
        help="world, bytes, or a file (default: that of the run whose folder holds the adapter or model, or by the "
        "model's vocabulary, 65536: world, 257: bytes)",
    )
    add("--batch", type=positive, default=32, help="answers drawn at once (default %(default)s)")
    add("--precision", choices=("fp32", "bf16"), help="default: fp32, on a GPU bf16")
    add(
        "--weights",
        choices=WEIGHTS,
        help="round the matrices to blocks of such integers when the model is loaded, for speed and memory "
        "(default: as --precision says)",
    )
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, Sampling]:
    """Parse argv, and apply --escapes -> the flags and their Sampling. Raises UserError for flags that are mistaken or
    contradict each other."""
    args = build_parser().parse_args(argv)
    if args.escapes:
        args.prompt = args.prompt and [unescaped(text) for text in args.prompt]
        args.system = args.system and unescaped(args.system)
        args.stop = [unescaped(text) for text in args.stop]
    if args.system is not None and not args.system.strip():
        raise UserError("--system: an empty text says nothing; leave it out")
    return args, sampling_of(args)


def note_escapes(args: argparse.Namespace, flags: str, texts: Iterable[str]) -> None:
    """Print a note if texts of flags hold \\n, and --escapes is not given."""
    if not args.escapes and any("\\n" in text for text in texts):
        print(rf"note: \n in {flags} is a backslash and an n; add --escapes to read it as a newline", file=sys.stderr)


def unescaped(text: str) -> str:
    r"""A text with \n, \t and \\ replaced by newline, tab and backslash; other backslashes stay."""
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)
