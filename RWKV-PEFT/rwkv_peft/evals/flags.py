"""The flags of `rwkv-peft eval`, judged before torch is imported."""

import argparse
import difflib
import importlib.util
from pathlib import Path

from ..cli import Parser, count, not_negative, positive
from ..errors import UserError
from ..generate.flags import add_model_flags, unescaped
from ..installing import how_to_install
from ..names import EVAL_TASKS, WRITTEN

USAGE = """Score a model's answers.

    rwkv-peft eval gsm8k --model merged.pth --data test.jsonl --output answers.jsonl
    rwkv-peft eval gsm8k --model base.pth --data test.jsonl --shots 4 --shots_data train.jsonl
    rwkv-peft eval jsonl --model base.pth --adapter out/mine --data mine.jsonl --stop '\\n' --escapes
    rwkv-peft eval choices --model merged.pth --data arc.jsonl
    rwkv-peft eval lambada_openai arc_easy --model merged.pth --output results.json
    rwkv-peft eval mmlu --model base.pth --adapter out/mine --shots 5 --limit 100
    rwkv-peft eval mine --include_path tasks --model merged.pth

A task of ours asks the questions in --data FILE, and needs no network:

gsm8k    question, answer (…#### 72), or MetaMath's query, response: numbers, after #### or "The answer is" (strict),
         or the last one of the answer (flexible)
math     problem, solution (…\\boxed{…}), or MetaMath's rows: formulas that mean the same, by math-verify
jsonl    rows as preprocess takes them: the row's answer, letter by letter (strict), or without regard to case, spacing
         and the last full stop (flexible)
choices  question, choices, answer: the most probable continuation, by its sum or by byte
lambada  text: its last word, and the word's perplexity

Answers are generated greedily, many at once. With --output each problem becomes a line of that file, and the same
command continues where it stopped.

Any other name is a task, a group or a pattern (mmlu_*) of EleutherAI's lm-evaluation-harness, and there may be several.
Their data is downloaded from the Hugging Face hub the first time, unless a task's YAML names files of yours
(dataset_path: json, data_files). They need the package lm_eval: pip install -r requirements-eval.txt.
"""


def add_own_flags(parser: Parser) -> list[argparse.Action]:
    """Add the flags of our own tasks -> these."""
    add = parser.add_argument_group("a task of ours").add_argument
    return [
        add("--data", metavar="FILE", help="problems: .jsonl, .json, .parquet, or a datasets folder"),
        add("--split", default="", metavar="SPLIT", help="rows to take, such as test or [:200]"),
        add(
            "--template",
            metavar="NAME",
            help="layout of a question: chat, question, instruction, plain, metamath, or a file with {question} "
            "(default chat for gsm8k and math, question for choices, plain for lambada, for jsonl the rows' own form)",
        ),
        add("--shots_data", metavar="FILE", help="the file whose first rows are --shots; another than --data"),
        add("--max_tokens", type=positive, default=512, help="the most tokens of an answer (default 512)"),
        add("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end an answer, beside the layout's own"),
        add("--escapes", action="store_true", help=r"read \n, \t and \\ in --stop as newline, tab, backslash"),
        add(
            "--at_least",
            type=not_negative,
            default=0.0,
            metavar="SHARE",
            help="exit with 1 if the first measure is below, such as 0.9",
        ),
    ]


def add_harness_flags(parser: Parser) -> list[argparse.Action]:
    """Add the flags of the harness's tasks -> these."""
    add = parser.add_argument_group("tasks of the lm-evaluation-harness").add_argument
    add("--harness", action="store_true", help="take the harness's task if a name is one of ours too, such as gsm8k")
    return [
        add("--limit", type=positive, metavar="N", help="only ask the first N questions of each task, to try it"),
        add("--include_path", metavar="DIR", help="a folder with tasks of your own, as YAML"),
        add("--samples", metavar="JSONL", help="write each question with the model's response here, a line each"),
    ]


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse argv, and apply --escapes -> the flags; harness is True if the tasks are the harness's, else task is ours.
    Raises UserError for flags that are mistaken or contradict each other."""
    parser = Parser(prog="rwkv-peft eval", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tasks", nargs="+", metavar="TASK", help=f"one of {', '.join(EVAL_TASKS)}; or tasks of the harness")
    add_model_flags(parser)
    add(
        "--output",
        metavar="FILE",
        help="write each problem with its answer here as JSONL, and continue after the lines that are there; harness: "
        "its results as JSON",
    )
    add(
        "--shots",
        "--num_fewshot",
        type=count,
        metavar="N",
        help="solved problems before each question (default: 0, or the harness's own number)",
    )
    own, harness = add_own_flags(parser), add_harness_flags(parser)
    args = parser.parse_args(argv)
    ours = [] if args.harness else [task for task in args.tasks if task in EVAL_TASKS]
    args.harness = not ours
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: at least 1 is due")
    if ours and len(args.tasks) > 1:
        raise UserError(
            f"{' '.join(args.tasks)}: {ours[0]} is a task of ours, and goes with no other; leave the rest out, or add "
            "--harness for the harness's task of that name"
        )
    for action in harness if ours else own:
        if getattr(args, action.dest) != action.default:
            raise UserError(refusal(action.option_strings[0], args.tasks[0], bool(ours)))
    (check_own if ours else check_harness)(args)
    return args


def refusal(flag: str, task: str, ours: bool) -> str:
    """The refusal of a flag that the tasks do not have."""
    if ours:
        return f"{flag} is for tasks of the lm-evaluation-harness, and {task} is ours; leave it out, or add --harness"
    near = difflib.get_close_matches(task, EVAL_TASKS, 1)
    meant = f"did you mean {near[0]}?" if near and near[0] != task else "leave it out"
    return f"{flag} is for {', '.join(EVAL_TASKS)}, and {task} is a task of the lm-evaluation-harness; {meant}"


def check_own(args: argparse.Namespace) -> None:
    """Check the flags of a task of ours, and apply --escapes."""
    args.task, args.shots = args.tasks[0], args.shots or 0
    if not args.data:
        raise UserError(
            f"--data is missing: the file whose rows {args.task} asks; --harness takes the lm-evaluation-harness's "
            "task of that name, which has its own data"
        )
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


def check_harness(args: argparse.Namespace) -> None:
    """Check the flags of the harness's tasks, and that its package is installed."""
    if args.include_path and not Path(args.include_path).is_dir():
        raise UserError(f"--include_path {args.include_path} is no folder; name the one that the tasks' .yaml lie in")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"{' '.join(args.tasks)}: tasks other than {', '.join(EVAL_TASKS)} are the lm-evaluation-harness's, whose "
            f"package lm_eval this Python lacks; {how_to_install('requirements-eval.txt')}"
        )
