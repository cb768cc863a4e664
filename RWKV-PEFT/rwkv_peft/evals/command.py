"""Ask a model problems, judge its answers and print the score: `rwkv-peft eval` (flags.py has its flags)."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from ..checkpoints.adapters import product_of_run
from ..checkpoints.atomic import check_output, same_file, write_text
from ..checkpoints.base import open_base
from ..checkpoints.mapped import Stamp
from ..checkpoints.readable import files_below
from ..cli.errors import Ended, UserError, ending_of
from ..cli.streams import bar_seconds
from ..cli.tables import TASKS
from ..data.asked import clean_beside
from ..data.tokenizer import KNOWN_SIZES
from ..inference.flags import note_escapes
from ..inference.loading import load_subject
from .asking import ask
from .flags import parse_flags
from .records import Records, share_of, summary
from .rows import LAYOUTS, Problem, Task, example, layout_of, read_problems

INPUTS = ("model", "data", "shots_data", "state", "tokenizer", "template", "lora_init")
OTHERS = ("task", "adapter", "bone_mode", "lora_alpha", "precision", "device", "split", "shots", "max_tokens", "stop")
HARNESS_INPUTS = ("model", "state", "tokenizer", "include_path")
SETTINGS = (*INPUTS, *OTHERS)  # answers depend on them: a file of answers is continued only if they agree


def main(argv: list[str]) -> int:
    """Run the command -> the exit code. Raises UserError for mistakes in flags, files and tasks."""
    args = parse_flags(argv)
    return ask_harness(args) if args.harness else ask_rows(args)


def ask_rows(args: Any) -> int:
    """Ask the rows of --data -> the exit code: 1 if the score is below --at_least, 128 + the signal's number after
    Ctrl-C or Ended, else 0. Raises UserError for mistakes in files."""
    task = TASKS[args.task]()
    clean = clean_beside(*reversed(args.adapter), args.state, args.model)
    clean = clean if args.clean_turns is None else args.clean_turns
    if args.output:
        inputs = [(f"--{name}", getattr(args, name)) for name in INPUTS]
        check_output("--output", args.output, [*inputs, *(("--adapter", path) for path in args.adapter)])
    note_escapes(args, "--stop", args.stop)
    layout = layout_of(task, args.template)
    problems = read_problems(task, args.data, args.split, layout, clean)
    shots = read_shots(task, args, layout, clean)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"files": stamps(args), "clean_turns": clean}
    try:
        with Records.open(args.output, settings, task.measures) as records:
            due = {
                number: problem._replace(prompt=shots + problem.prompt)
                for number, problem in enumerate(problems)
                if number not in records.found
            }
            if due:
                answer_due(args, task, due, records)
    except (KeyboardInterrupt, Ended) as end:
        words, code = ending_of(end)
        kept = f"; {args.output} has {len(records.found):,} of {len(problems):,}, and the same command goes on"
        print(f"\n{words}" + (kept if args.output else ""), file=sys.stderr)
        return code
    found = records.ordered()
    print("\n".join(summary(args.task, task.measures, found)))
    return int(share_of(task.measures[0], found) < args.at_least)


def stamps(args: Any) -> dict[str, list[int]]:
    """The stamps {path: [size in bytes, time of last change in ns]} of the files that are read, those in folders
    included: they tell that a file of the same name is another one."""
    named = (*LAYOUTS, *dict(KNOWN_SIZES).values())  # names of layouts and tokenizers, not of files
    given = [path for name in INPUTS if (path := getattr(args, name)) and path not in named] + args.adapter
    files = (file for path in given if os.path.exists(path) for file in files_below(product_of_run(path)))
    return {str(file): list(Stamp.of(file)[2:]) for file in files}


def read_shots(task: Task, args: Any, layout: str, clean: bool) -> str:
    """Read the solved problems that go before each question, as one text; "" without --shots. Raises UserError if
    --shots_data is --data or holds too few."""
    if not args.shots:
        return ""
    if same_file(args.shots_data, args.data):
        raise UserError(f"--shots_data {args.shots_data} is --data, and would show its answers; give another file")
    found = read_problems(task, args.shots_data, f"[:{args.shots}]", layout, clean)
    if len(found) < args.shots:
        raise UserError(f"--shots {args.shots}: {args.shots_data} holds {len(found)}; give fewer, or another file")
    return "".join(map(example, found))


def answer_due(args: Any, task: Task, due: Mapping[int, Problem], records: Records) -> None:
    """Load the model, ask it the problems that have no Record yet, {number: Problem}, and add their Records."""
    subject = load_subject(args, lambda text: print(text, file=sys.stderr))
    with tqdm(total=len(due), unit="problem", mininterval=bar_seconds(sys.stderr), dynamic_ncols=True) as bar:
        for record in ask(task, subject, due, args.batch, args.max_tokens, args.stop):
            records.add(record)
            bar.update()


def ask_harness(args: Any) -> int:
    """Ask the tasks -> the exit code, 130 after Ctrl-C. Raises UserError for mistakes in files and tasks."""
    check_outputs(args)
    open_base(args.model)  # before the files of the tasks, which take half a minute to read
    from .harness import evaluate, load_tasks, plain, tables

    try:
        tasks, names = load_tasks(args.tasks, args.include_path)
        subject = load_subject(args, lambda text: print(text, file=sys.stderr))
        results = evaluate(subject, tasks, names, args.batch, args.shots, args.limit)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    results["config"] = {name: getattr(args, name) for name in ("model", "adapter", "state", "shots", "limit")}
    samples = results.pop("samples")
    if args.output:
        write_text(args.output, json.dumps(results, indent=2, default=plain, ensure_ascii=False) + "\n")
    if args.samples:
        write_text(args.samples, lines(samples, plain))
    print(tables(results))
    return 0


def check_outputs(args: Any) -> None:
    """Raise UserError for outputs that are inputs, are the same file, or cannot be written."""
    inputs = [(f"--{name}", getattr(args, name)) for name in HARNESS_INPUTS]
    inputs += [("--adapter", path) for path in args.adapter]
    outputs = [(name, path) for name in ("output", "samples") if (path := getattr(args, name))]
    for name, path in outputs:
        check_output(f"--{name}", path, inputs)
    if len(outputs) == 2 and os.path.realpath(args.output) == os.path.realpath(args.samples):
        raise UserError(f"--output and --samples are both {args.output}; give each a file of its own")


def lines(samples: dict[str, list[dict[str, Any]]], default: Callable[[object], object]) -> str:
    """Write a line of JSON for each question of each task."""
    records = [{"task": task} | sample for task, found in samples.items() for sample in found]
    return "".join(json.dumps(record, default=default, ensure_ascii=False) + "\n" for record in records)
