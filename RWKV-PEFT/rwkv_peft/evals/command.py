"""Score a model's answers to problems, and print the shares that are right: `rwkv-peft eval` (flags.py has its flags).

With --output each problem is a line of JSON in a file, below a first line of settings.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from tqdm import tqdm

from ..checkpoints.atomic import check_output, same_file, write_text
from ..checkpoints.base import open_base
from ..cli.errors import Ended, UserError, bar_seconds, ending_of
from ..cli.parser import counted
from ..cli.tables import TASKS
from ..data.chat import ChatLayout
from ..data.recorded import CLEAN, TOOL_FORM, chat_beside
from ..inference.flags import note_escapes
from ..inference.loading import load_subject
from .flags import parse_flags
from .questions import Record, ask, share_of
from .rows import Task, example, layout_of, read_problems

INPUTS = ("model", "data", "shots_data", "state", "tokenizer", "template", "lora_init")
OTHERS = ("task", "adapter", "scales", "bone_mode", "lora_alpha", "precision", "device", "split", "shots")
HARNESS_INPUTS = ("model", "state", "tokenizer", "include_path")
SETTINGS = (*INPUTS, *OTHERS, "max_tokens", "stop")  # answers depend on them
HEAD = "eval"  # the key of a file's first line


def main(argv: list[str]) -> int:
    """Run the command -> the exit code. Raises UserError for mistakes in flags, files and tasks."""
    args = parse_flags(argv)
    return score_harness(args) if args.harness else score_rows(args)


def score_rows(args: Any) -> int:
    """Score the answers to the rows of --data -> the exit code: 1 if the score is below --at_least, 128 + the signal's
    number after Ctrl-C or Ended, else 0. Raises UserError for mistakes in files."""
    task = TASKS[args.task]()
    files = (*reversed(args.adapter), args.state, args.model)
    chat = chat_beside(*files, clean=args.clean_turns, tool_form=args.tool_form)
    check_outputs(args, INPUTS, "output")
    note_escapes(args, "--stop", args.stop)
    layout = layout_of(task, args.template)
    problems = read_problems(task, args.data, args.split, layout, chat)
    shots = read_shots(task, args, layout, chat)
    asked = {number: problem._replace(prompt=shots + problem.prompt) for number, problem in enumerate(problems)}
    subject, records = load_subject(args, lambda text: print(text, file=sys.stderr)), list[Record]()
    ended: tuple[str, int] | None = None
    try:
        answered = ask(task, subject, asked, args.batch, args.max_tokens, args.stop)
        records.extend(tqdm(answered, total=len(asked), unit="problem", mininterval=bar_seconds(sys.stderr)))
    except (KeyboardInterrupt, Ended) as end:
        ended = ending_of(end)
    records.sort(key=itemgetter("number"))
    if args.output:
        settings = {name: getattr(args, name) for name in SETTINGS} | {
            CLEAN: chat.clean,
            TOOL_FORM: chat.tool_form.name,
        }
        write_text(args.output, "".join(map(line, [{HEAD: settings}, *records])))
    if ended:
        words, code = ended
        print(f"\n{words} after {len(records):,} of {counted(len(asked), 'problem')}", file=sys.stderr)
        return code
    print("\n".join(summary(args.task, task.measures, records)))
    return int(share_of(task.measures[0], records) < args.at_least)


def read_shots(task: Task, args: Any, layout: str, chat: ChatLayout) -> str:
    """Read the few-shot examples that go before each question, as one text; "" without --shots. Raises UserError if
    --shots_data is --data or holds too few."""
    if not args.shots:
        return ""
    if same_file(args.shots_data, args.data):
        raise UserError(f"--shots_data {args.shots_data} is --data, and would show its answers; give another file")
    shots = read_problems(task, args.shots_data, f"[:{args.shots}]", layout, chat)
    if len(shots) < args.shots:
        raise UserError(f"--shots {args.shots}: {args.shots_data} holds {len(shots)}; give fewer, or another file")
    return "".join(map(example, shots))


def line(record: Record, default: Callable[[object], object] | None = None) -> str:
    return json.dumps(record, ensure_ascii=False, default=default) + "\n"


def standard_error(share: float, total: int) -> float:
    """The standard error of a share among `total` independent answers, by their sample variance; NaN for one."""
    return math.sqrt(share * (1 - share) / (total - 1)) if total > 1 else math.nan


def summary(task: str, measures: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The score of records in lines: the share by each measure, and the number of answers cut off."""
    total = len(records)
    lines = [f"{task}: {counted(total, 'problem')}"]
    for name in measures:
        share = share_of(name, records)
        error = standard_error(share, total)
        spread = f" ± {error:.1%} (standard error)" if math.isfinite(error) else ""
        lines.append(f"{name:<10} {share:7.1%}{spread}, {share * total:,.0f} of {total:,}")
    if long := sum(record.get("end") == "length" for record in records):
        lines.append(f"{counted(long, 'answer')} cut off at --max_tokens")
    return lines


def score_harness(args: Any) -> int:
    """Run tasks of the lm-evaluation-harness -> the exit code, 130 after Ctrl-C. Raises UserError for mistakes in files
    and tasks."""
    check_outputs(args, HARNESS_INPUTS, "output", "samples")
    open_base(args.model)  # before the files of the tasks, which take half a minute to read
    from .harness import evaluate, load_tasks, plain, tables

    try:
        tasks, names = load_tasks(args.tasks, args.include_path)
        subject = load_subject(args, lambda text: print(text, file=sys.stderr))
        results = evaluate(subject, tasks, names, args.batch, args.shots, args.limit)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    results["config"] = {
        name: getattr(args, name) for name in ("model", "adapter", "scales", "state", "shots", "limit")
    }
    samples = results.pop("samples")
    if args.output:
        write_text(args.output, json.dumps(results, indent=2, default=plain, ensure_ascii=False) + "\n")
    if args.samples:
        records = ({"task": task} | sample for task, samples_of_task in samples.items() for sample in samples_of_task)
        write_text(args.samples, "".join(line(record, plain) for record in records))
    print(tables(results))
    return 0


def check_outputs(args: Any, names: Sequence[str], *outputs: str) -> None:
    """Raise UserError for outputs that are inputs, are the same file, or cannot be written."""
    inputs = [(f"--{name}", getattr(args, name)) for name in names]
    inputs += [("--adapter", path) for path in args.adapter]
    named_outputs = [(name, path) for name in outputs if (path := getattr(args, name))]
    for name, path in named_outputs:
        check_output(f"--{name}", path, inputs)
    if len({os.path.realpath(path) for _, path in named_outputs}) < len(named_outputs):
        raise UserError(f"--output and --samples are both {args.output}; give each a file of its own")
