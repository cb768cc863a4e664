"""The flags of `rwkv-peft eval`, judged before torch is imported."""

import argparse

from ..cli import Parser, count, not_negative, positive
from ..errors import UserError
from ..generate.flags import add_model_flags, unescaped
from ..names import EVAL_TASKS, WRITTEN

USAGE = """How well does a model answer?

    rwkv-peft eval gsm8k --model merged.pth --data test.jsonl --output answers.jsonl
    rwkv-peft eval gsm8k --model base.pth --data test.jsonl --shots 4 --shots_data train.jsonl
    rwkv-peft eval jsonl --model base.pth --adapter out/mine --data mine.jsonl --stop '\\n' --escapes
    rwkv-peft eval choices --model merged.pth --data arc.jsonl

gsm8k    question, answer (…#### 72), or MetaMath's query, response: numbers, behind #### or "The answer is" (strict),
         or the last one of the answer (flexible)
math     problem, solution (…\\boxed{…}), or MetaMath's rows: formulas that mean the same, by math-verify
jsonl    rows as preprocess takes them: the row's answer, letter by letter (strict), or but for case, spacing and the
         last full stop (flexible)
choices  question, choices, answer: the most probable continuation, by its sum or by byte
lambada  text: its last word, and the word's perplexity

Answers are written greedily, many at once. With --output each problem is a line of it, and the same command goes on
where it stopped.
"""


def build_parser() -> Parser:
    parser = Parser(prog="rwkv-peft eval", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("task", choices=EVAL_TASKS, help=f"one of {', '.join(EVAL_TASKS)}", metavar="TASK")
    add_model_flags(parser)
    add("--data", required=True, metavar="FILE", help="problems: .jsonl, .json, .parquet, or a datasets folder")
    add("--split", default="", metavar="SPLIT", help="rows to take, such as test or [:200]")
    add("--output", metavar="JSONL", help="write each problem with its answer here, and go on from what stands there")
    add(
        "--template",
        metavar="NAME",
        help="how a question is put: chat, question, instruction, plain, metamath, or a file with {question} (default "
        "chat for gsm8k and math, question for choices, plain for lambada, for jsonl the rows' own form)",
    )
    add("--shots", type=count, default=0, metavar="N", help="solved problems before each question (default 0)")
    add("--shots_data", metavar="FILE", help="where they are from: its first N rows; another file than --data")
    add("--max_tokens", type=positive, default=512, help="longest answer (default 512)")
    add("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end an answer, besides the layout's own")
    add("--escapes", action="store_true", help=r"read \n, \t and \\ in --stop as newline, tab, backslash")
    add(
        "--at_least",
        type=not_negative,
        default=0.0,
        metavar="SHARE",
        help="exit with 1 where the first measure is below, such as 0.9",
    )
    return parser


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse argv, and apply --escapes -> the flags. Raises UserError for flags that are mistaken or contradict each
    other."""
    args = build_parser().parse_args(argv)
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: at least 1 is due")
    if args.at_least > 1:
        raise UserError(f"--at_least {args.at_least}: a share from 0 to 1 is due, as 0.9 for 90 %")
    if bool(args.shots) != bool(args.shots_data):
        raise UserError(
            "--shots N takes its examples from --shots_data FILE; give both, and another file than --data, or neither"
        )
    if args.stop and args.task not in WRITTEN:
        raise UserError(f"--stop ends an answer that is written, and {args.task} writes none; leave it out")
    if args.escapes:
        args.stop = [unescaped(text) for text in args.stop]
    if "" in args.stop:
        raise UserError("--stop: an empty text would stop before the first token; leave it out")
    return args
