"""Ask a model tasks of the lm-evaluation-harness, and write its table and its JSON: `rwkv-peft eval arc_easy …`."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..files.atomic import atomic_write, check_output
from ..files.base import open_base
from ..generate.loading import load_subject

INTERRUPTED = 130
INPUTS = ("model", "state", "tokenizer", "include_path")


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
        return INTERRUPTED
    results["config"] |= {name: getattr(args, name) for name in ("model", "adapter", "state")}
    samples = results.pop("samples")
    if args.output:
        write(args.output, json.dumps(results, indent=2, default=plain, ensure_ascii=False) + "\n")
    if args.samples:
        write(args.samples, lines(samples, plain))
    print(tables(results))
    return 0


def check_outputs(args: Any) -> None:
    """Raise UserError for outputs that are inputs, are the same file, or cannot be written."""
    inputs = [(f"--{name}", getattr(args, name)) for name in INPUTS]
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


def write(path: str, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
