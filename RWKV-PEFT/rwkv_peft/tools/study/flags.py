"""The flags of `rwkv-peft study`, its own and those of train.py, checked before torch is imported."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...cli.errors import UserError
from ...cli.names import NONE, STATE
from ...cli.parser import FLAG, Parser, above_zero, add_stop_flag, constrained, count, positive, share
from ...cli.rules import EXCLUDES, Rule
from ...inference.flags import unescaped
from ...training.flags.parser import build_parser as build_train_parser
from ...training.flags.request import parse_flags as parse_train_flags
from ...training.flags.request import with_settings

PROG = "rwkv-peft study"
ROWS = "questions.jsonl"  # in the folder of --output
ASK = "User: Ask one question that this text answers.\\n\\nAssistant:"
# flags of train.py that follow from those of the command, or that train nothing
OURS = "data_file data_type proj_dir check_flags show_samples write_config train_stage my_pile_stage".split()
RULES = (
    Rule(
        "--rows",
        EXCLUDES,
        "--part_tokens, --questions, --question_tokens, --answer_tokens, --temperature, --top_p, --seed, "
        "--ask, --answer, --stop",
        "it is about drawing questions, and these are there",
        "leave it out",
    ),
)
USAGE = """Learn a document: the model asks itself questions about each part of it, answers them with the part before
it, and is then trained to say the same without it.

    rwkv-peft study manual.txt --load_model base.pth --output out/manual
    rwkv-peft study manual.txt --load_model base.pth --output out/manual --peft bone --bone_r 64 --lr_init 1e-4
    rwkv-peft study --rows out/manual/questions.jsonl --load_model base.pth --output out/again

DOCUMENT is a text, and the first word. Flags that are not below are train.py's; by default only states train (--peft
none --train_parts state), and --val_split 0.1 keeps a tenth of the questions to measure on. The questions are written
to questions.jsonl in the folder of --output; read and correct them, and train on them with --rows. Before and after
training the command tells how likely the answers to the held-out questions are, with and without the text.
"""


@dataclass(frozen=True)
class Study:
    """The settings of the command. words are the flags of train.py; rows is a file of questions that exist already, ""
    if they are to be sampled from `document`. stop, ask and answer are texts: ends of a question or an answer, and the
    prompts for a question and for an answer ("" for a chat)."""

    document: str
    rows: str
    output: str
    words: tuple[str, ...]
    part_tokens: int
    questions: int
    question_tokens: int
    answer_tokens: int
    temperature: float
    top_p: float
    seed: int
    ask: str
    answer: str
    stop: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file of questions to learn from."""
        return Path(self.rows) if self.rows else Path(self.output) / ROWS


def build_parser() -> Parser:
    parser = Parser(
        prog=PROG,
        rules=RULES,
        usage=f"{PROG} [DOCUMENT] --load_model MODEL --output DIR [flags] [flags of train.py]",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--load_model", "--model", required=True, metavar="MODEL", help="the base, a .pth or a folder")
    add("--output", required=True, metavar="DIR", help="folder of the run: questions, state or adapter, figures")
    add("--rows", default="", metavar="FILE", help="learn from these questions instead of drawing any from a DOCUMENT")
    add(
        "--part_tokens",
        type=constrained(positive, lambda value: value >= 16, "is below 16"),
        default=512,
        metavar="N",
        help="the most tokens of a part of the document, which the model has before it (default 512)",
    )
    add("--questions", type=positive, default=16, metavar="N", help="questions to draw from each part (default 16)")
    add("--question_tokens", type=positive, default=64, metavar="N", help="the most tokens of a question (default 64)")
    add("--answer_tokens", type=positive, default=128, metavar="N", help="the most tokens of an answer (default 128)")
    add("--temperature", type=above_zero, default=1.0, help="of drawn questions (default 1); answers are greedy")
    add("--top_p", type=share, default=0.9, help="share of the probability to draw questions from (default 0.9)")
    add("--seed", type=count, default=0, help="of drawn questions (default 0)")
    add(
        "--ask",
        default=ASK,
        metavar="TEXT",
        help=rf"the text behind a part and a blank line that the model goes on from to ask; \n is a newline (default "
        f"'{ASK}')",
    )
    add(
        "--answer",
        default="",
        metavar="TEXT",
        help=r"the same to answer, with {question} in it, such as 'Q: {question}\nA:' (default: a chat's turn)",
    )
    add_stop_flag(add, "texts that end an answer, besides the next turn of a chat; a question also ends with its line")
    return parser


def parse_flags(argv: Sequence[str]) -> Study:
    """Parse argv -> Study, without torch. Raises UserError for mistaken flags, also those of train.py."""
    document, words = (argv[0], argv[1:]) if argv and not FLAG.match(argv[0]) else ("", argv)
    parser = build_parser()
    own, theirs = parted(words, parser)
    args = parser.parse_args(own)
    if bool(document) == bool(args.rows):
        what = "both name what to learn from; leave one out" if document else "give one, the DOCUMENT as the first word"
        raise UserError(f"{PROG} takes a DOCUMENT or --rows: {what}")
    if args.answer and "{question}" not in args.answer:
        raise UserError(f"--answer {args.answer}: it has no {{question}}, in whose place each question stands; add it")
    theirs = [*with_settings(theirs, build_train_parser())]
    names = {word.partition("=")[0] for word in theirs if FLAG.match(word)}
    if refused := next((name for name in OURS if f"--{name}" in names), None):
        raise UserError(f"--{refused} is set by {PROG}, or has no use there; leave it out")
    longest = args.part_tokens + args.question_tokens + args.answer_tokens
    own_values = vars(args) | {"ask": unescaped(args.ask), "answer": unescaped(args.answer)}
    base = own_values.pop("load_model")
    study = Study(document, words=(), **(own_values | {"stop": tuple(map(unescaped, args.stop))}))
    theirs += ["--load_model", base, "--data_file", str(study.path), "--data_type", "contexts"]
    theirs += ["--proj_dir", args.output]
    if args.stop and "--eval_stop" not in names:  # of the rows that the run answers
        theirs += ["--eval_stop", *args.stop]
    if "--peft" not in names:
        theirs += ["--peft", NONE, *(() if "--train_parts" in names else ("--train_parts", STATE))]
    if not names & {"--val_split", "--val_data"}:
        theirs += ["--val_split", "0.1"]
    if "--ctx_len" not in names:
        theirs += ["--ctx_len", str(2 * longest)]  # the layout and rows of others take some, too
    flags = parse_train_flags(theirs)
    if document and flags.data.ctx_len < longest:
        raise UserError(
            f"--ctx_len {flags.data.ctx_len} has no room for --part_tokens {args.part_tokens} with a question and an "
            f"answer, {longest} tokens in all; raise it, or lower those"
        )
    if flags.world.nodes > 1 or not flags.world.launches:
        raise UserError(f"{PROG} starts the processes of one machine itself; give --devices, and start it alone")
    return replace(study, words=tuple(theirs))


def parted(words: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """Part the words of a command line into those of a parser's own flags, and the others."""
    own, theirs = list[str](), list[str]()
    here = theirs
    for word in words:
        if FLAG.match(word):
            here = own if word.partition("=")[0] in parser._option_string_actions else theirs
        here.append(word)
    return own, theirs
