"""The flags of `rwkv-peft lm_eval`, judged before torch is imported."""

import argparse
from pathlib import Path

from ..cli import Parser, count, positive
from ..errors import UserError
from ..generate.flags import add_model_flags

USAGE = """A model on the tasks of EleutherAI's lm-evaluation-harness.

    rwkv-peft lm_eval lambada_openai arc_easy --model merged.pth --output results.json
    rwkv-peft lm_eval mmlu --model base.pth --adapter out/mine --num_fewshot 5 --limit 100
    rwkv-peft lm_eval mine --include_path tasks --model merged.pth

TASKS are names of tasks or groups, or patterns such as mmlu_*. A task's data is downloaded from the Hugging Face hub
the first time, unless its YAML names files of yours (dataset_path: json, data_files). The package lm_eval is needed:
pip install -r requirements-eval.txt.
"""


def build_parser() -> Parser:
    parser = Parser(prog="rwkv-peft lm_eval", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tasks", nargs="+", metavar="TASK", help="tasks, groups or patterns of them")
    add_model_flags(parser)
    add("--num_fewshot", type=count, metavar="N", help="solved examples before each question (default: the task's)")
    add("--limit", type=positive, metavar="N", help="the first N questions of each task alone, to try it")
    add("--include_path", metavar="DIR", help="a folder with tasks of your own, as YAML")
    add("--output", metavar="JSON", help="write lm_eval's results here")
    add("--samples", metavar="JSONL", help="write each question with what the model made of it here, a line each")
    return parser


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Parse argv -> the flags. Raises UserError for flags that are mistaken."""
    args = build_parser().parse_args(argv)
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: at least 1 is due")
    if args.include_path and not Path(args.include_path).is_dir():
        raise UserError(f"--include_path {args.include_path} is no folder; name the one that the tasks' .yaml lie in")
    return args
