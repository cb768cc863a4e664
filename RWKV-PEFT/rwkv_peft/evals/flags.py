"""The flags of `rwkv-peft eval`, judged before torch is imported."""

import argparse
import difflib
import importlib.util
from pathlib import Path

from ..cli.errors import UserError
from ..cli.installing import how_to_install
from ..cli.parser import Parser, add_stop_flag, count, positive, share
from ..cli.rules import EXCLUDES, NEEDS, Rule
from ..cli.tables import TASKS
from ..inference.flags import add_model_flags, unescaped

OURS, HARNESS = "a task of ours", "tasks of the lm-evaluation-harness"
OTHERS, CHOICES = "further tasks", "the task choices"
PROG, LEFT = "rwkv-peft eval", "a task of earlier versions"
THEIRS = "lm_eval has lambada_openai, hendrycks_math and gsm8k, with data of their own"
OF_OURS = (
    "--data, --split, --template, --shots_data, --max_tokens, --stop, --escapes, --at_least, --clean_turns, --tool_form"
)
RULES = (
    Rule(LEFT, EXCLUDES, PROG, THEIRS, f"name one of these, or ask rows of yours as {' or '.join(TASKS)}"),
    Rule(OURS, EXCLUDES, OTHERS, "it is asked alone", "leave the rest out"),
    Rule(OURS, NEEDS, "--data", "it asks the rows of that file", "name it"),
    Rule(OF_OURS, EXCLUDES, HARNESS, f"it is for {' and '.join(TASKS)}, which ask rows of yours", "leave it out"),
    Rule("--limit, --include_path, --samples", EXCLUDES, OURS, f"it is for {HARNESS}", "leave it out"),
    Rule("--shots !0", NEEDS, f"--shots_data, {HARNESS}", "examples are the first rows of that file"),
    Rule("--shots_data", NEEDS, "--shots !0", "examples are its first rows"),
    Rule("--max_tokens, --stop", EXCLUDES, CHOICES, "it is about written answers", "leave it out"),
)
USAGE = """Score a model's answers.

    rwkv-peft eval jsonl --model base.pth --adapter out/mine --data mine.jsonl --output answers.jsonl
    rwkv-peft eval jsonl --model merged.pth --data mine.jsonl --shots 4 --shots_data train.jsonl --stop '\\n' --escapes
    rwkv-peft eval choices --model merged.pth --data arc.jsonl
    rwkv-peft eval lambada_openai gsm8k --model merged.pth --output results.json
    rwkv-peft eval mmlu --model base.pth --adapter out/mine --shots 5 --limit 100
    rwkv-peft eval mine --include_path tasks --model merged.pth

A task of ours asks the rows of --data FILE, and needs no network:

jsonl    rows as preprocess takes them: the row's answer, letter by letter (strict), or without regard to case, spacing
         and the last full stop (flexible)
choices  question, choices, answer: the most probable continuation, by its sum or by byte

Answers are generated greedily, many at once. With --output each problem becomes a line of that file.

Any other name is a task, a group or a pattern (mmlu_*) of EleutherAI's lm-evaluation-harness, and there may be several.
Their data is downloaded from the Hugging Face hub the first time, unless a task's YAML names files of yours
(dataset_path: json, data_files). They need the extra eval: sh scripts/setup.sh eval.
"""


def add_own_flags(parser: Parser) -> None:
    add = parser.add_argument_group(OURS).add_argument
    add("--data", metavar="FILE", help="problems: .jsonl, .json, .parquet, or a datasets folder")
    add("--split", default="", metavar="SPLIT", help="rows to take, such as test or [:200]")
    add(
        "--template",
        metavar="NAME",
        help="layout of a question: chat, question, instruction, plain, metamath, or a file with {question} "
        "(default question for choices, for jsonl the rows' own form)",
    )
    add("--shots_data", metavar="FILE", help="the file whose first rows are --shots; another than --data")
    add("--max_tokens", type=positive, default=512, help="the most tokens of an answer (default 512)")
    add_stop_flag(add, "texts that end an answer, beside the layout's own")
    add("--escapes", action="store_true", help=r"read \n, \t and \\ in --stop as newline, tab, backslash")
    add(
        "--at_least",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="exit with 1 if the first measure is below, such as 0.9",
    )


def add_harness_flags(parser: Parser) -> None:
    add = parser.add_argument_group(HARNESS).add_argument
    add("--harness", action="store_true", help=argparse.SUPPRESS)  # of earlier versions, which had a gsm8k of ours
    add("--limit", type=positive, metavar="N", help="only ask the first N questions of each task, to try it")
    add("--include_path", metavar="DIR", help="a folder with tasks of your own, as YAML")
    add("--samples", metavar="JSONL", help="write each question with the model's response here, a line each")


def facts_of(args: argparse.Namespace) -> dict[str, str | bool]:
    """The facts that RULES name, and the tasks that they hold for."""
    names = args.tasks or [""]
    left = next((name for name in names if name in ("lambada", "math")), "")
    facts = {LEFT: left, OURS: "", HARNESS: "", OTHERS: "", CHOICES: False}
    if task := ours_of(args):
        others = " ".join(name for name in names if name != task)
        return facts | {OURS: task, OTHERS: others, CHOICES: task == "choices"}
    near = difflib.get_close_matches(names[0], TASKS, 1)
    return facts | {HARNESS: "" if left else names[0] + (f"; did you mean {near[0]}?" if near else "")}


def ours_of(args: argparse.Namespace) -> str:
    """The task of ours that is asked, "" if the tasks are the harness's."""
    return next((name for name in args.tasks or () if name in TASKS), "")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse argv, and apply --escapes -> the flags; harness is True if the tasks are the harness's, else task is ours.
    Raises UserError for flags that are mistaken or contradict each other."""
    parser = Parser(
        prog=PROG, rules=RULES, facts=facts_of, description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tasks", nargs="+", metavar="TASK", help=f"{' or '.join(TASKS)}; or tasks of the harness")
    add_model_flags(parser)
    add(
        "--output",
        metavar="FILE",
        help="write each problem with its answer here as JSONL; harness: its results as JSON",
    )
    add(
        "--shots",
        "--num_fewshot",
        type=count,
        metavar="N",
        help="solved problems before each question (default: 0, or the harness's own number)",
    )
    add_own_flags(parser)
    add_harness_flags(parser)
    args = parser.parse_args(argv)
    args.task = ours_of(args)
    args.harness = not args.task
    if args.task:
        args.shots = args.shots or 0
        args.stop = [unescaped(text) for text in args.stop] if args.escapes else args.stop
    else:
        check_harness(args)
    return args


def check_harness(args: argparse.Namespace) -> None:
    """Check the flags of the harness's tasks, and that its package is installed."""
    if args.include_path and not Path(args.include_path).is_dir():
        raise UserError(f"--include_path {args.include_path} is no folder; name the one that the tasks' .yaml lie in")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"{' '.join(args.tasks)}: tasks other than {', '.join(TASKS)} are the lm-evaluation-harness's, whose "
            f"package lm_eval this Python lacks; {how_to_install('eval')}"
        )
