"""Score a model's answers to problems, and print the shares that are right: `rwkv-peft eval` (flags.py has its flags).

With --output each problem is a line of JSON in a file, below a first line of settings, and the same command continues
an interrupted run there.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ..checkpoints.adapters import product_of_run
from ..checkpoints.atomic import check_output, same_file, telling_failures, write_text
from ..checkpoints.base import open_base
from ..checkpoints.lock import alone_at
from ..checkpoints.readable import files_below, object_of
from ..cli.errors import Ended, UserError, bar_seconds, ending_of
from ..cli.parser import counted
from ..cli.tables import TASKS
from ..data.recorded import clean_beside
from ..data.tokenizer import KNOWN_SIZES
from ..inference.flags import note_escapes
from ..inference.loading import load_subject
from .flags import parse_flags
from .questions import Record, ask, share_of
from .rows import LAYOUTS, Problem, Task, example, layout_of, read_problems

INPUTS = ("model", "data", "shots_data", "state", "tokenizer", "template", "lora_init")
OTHERS = ("task", "adapter", "bone_mode", "lora_alpha", "precision", "device", "split", "shots", "max_tokens", "stop")
HARNESS_INPUTS = ("model", "state", "tokenizer", "include_path")
SETTINGS = (*INPUTS, *OTHERS)  # answers depend on them: a file of answers is continued only if they agree
HEAD = "eval"  # the key of a file's first line


def main(argv: list[str]) -> int:
    """Run the command -> the exit code. Raises UserError for mistakes in flags, files and tasks."""
    args = parse_flags(argv)
    return score_harness(args) if args.harness else score_rows(args)


def score_rows(args: Any) -> int:
    """Score the answers to the rows of --data -> the exit code: 1 if the score is below --at_least, 128 + the signal's
    number after Ctrl-C or Ended, else 0. Raises UserError for mistakes in files."""
    task = TASKS[args.task]()
    clean = clean_beside(*reversed(args.adapter), args.state, args.model)
    clean = clean if args.clean_turns is None else args.clean_turns
    check_outputs(args, INPUTS, "output")
    note_escapes(args, "--stop", args.stop)
    layout = layout_of(task, args.template)
    problems = read_problems(task, args.data, args.split, layout, clean)
    shots = read_shots(task, args, layout, clean)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"files": stamps(args), "clean_turns": clean}
    answers = AnswerFile(args.output and Path(args.output), settings)
    try:
        with answers.open():
            due = {
                number: problem._replace(prompt=shots + problem.prompt)
                for number, problem in enumerate(problems)
                if number not in answers.found
            }
            if due:
                answer_due(args, task, due, answers)
    except (KeyboardInterrupt, Ended) as end:
        words, code = ending_of(end)
        saved = f"; {args.output} has {len(answers.found):,} of {len(problems):,}, and the same command goes on"
        print(f"\n{words}" + (saved if args.output else ""), file=sys.stderr)
        return code
    found = answers.ordered()
    print("\n".join(summary(args.task, task.measures, found)))
    return int(share_of(task.measures[0], found) < args.at_least)


def stamps(args: Any) -> dict[str, list[int]]:
    """{path: [size in bytes, time of last change in ns]} of the files that are read, those in folders included, by
    which another file of the same name is detected."""
    named = (*LAYOUTS, *dict(KNOWN_SIZES).values())  # names of layouts and tokenizers, not of files
    given = [path for name in INPUTS if (path := getattr(args, name)) and path not in named] + args.adapter
    files = [file for path in given if os.path.exists(path) for file in files_below(product_of_run(path))]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def read_shots(task: Task, args: Any, layout: str, clean: bool) -> str:
    """Read the few-shot examples that go before each question, as one text; "" without --shots. Raises UserError if
    --shots_data is --data or holds too few."""
    if not args.shots:
        return ""
    if same_file(args.shots_data, args.data):
        raise UserError(f"--shots_data {args.shots_data} is --data, and would show its answers; give another file")
    found = read_problems(task, args.shots_data, f"[:{args.shots}]", layout, clean)
    if len(found) < args.shots:
        raise UserError(f"--shots {args.shots}: {args.shots_data} holds {len(found)}; give fewer, or another file")
    return "".join(map(example, found))


def answer_due(args: Any, task: Task, due: Mapping[int, Problem], answers: "AnswerFile") -> None:
    """Load the model, and add its Records of problems, {number: Problem}, to a file."""
    subject = load_subject(args, lambda text: print(text, file=sys.stderr))
    with tqdm(total=len(due), unit="problem", mininterval=bar_seconds(sys.stderr), dynamic_ncols=True) as bar:
        for record in ask(task, subject, due, args.batch, args.max_tokens, args.stop):
            answers.add(record)
            bar.update()


class AnswerFile:
    """Records of problems, `found` {number: Record}, in the file at a path (None: in memory alone)."""

    def __init__(self, path: Path | None, settings: Record) -> None:
        self.path, self.settings = path, settings
        self.found: dict[int, Record] = {}
        self.file: TextIO | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within, read and extend the file's Records; at the end its lines are in the order of the problems. Raises
        UserError for other settings, another tool's file, or a file that another process is writing."""
        if self.path is None:
            yield
            return
        with alone_at(self.path, lambda text: print(text, file=sys.stderr)):
            if self.path.exists():
                self.read(self.path)
            self.write(self.path)  # anew, without a last line that was cut off
            self.file = open(self.path, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
            try:
                yield
            finally:
                with telling_failures(self.path, "the answers before are kept, and the same command goes on"):
                    self.file.close()
                if self.found:
                    self.write(self.path)
                else:
                    self.path.unlink()  # a mistaken command leaves nothing that the next one would have to match

    def add(self, record: Record) -> None:
        """Add the Record of a problem, and write it."""
        self.found[record["number"]] = record
        if self.path is not None and self.file is not None:
            with telling_failures(self.path, "the answers before are kept, and the same command goes on"):
                self.file.write(line(record))

    def ordered(self) -> list[Record]:
        return [self.found[number] for number in sorted(self.found)]

    def read(self, path: Path) -> None:
        """Read a file's Records, without a last line that was cut off in writing. Raises UserError for other settings
        and for lines of other tools."""
        head, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
        before = object_of(head).get(HEAD)
        if not isinstance(before, dict):
            raise UserError(f"--output {path} is no file of rwkv-peft eval; choose another name")
        for name, value in self.settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"--output {path} holds answers of other settings ({change(name, before.get(name), value)}); "
                    "choose another name, or delete it"
                )
        for number, text in enumerate(lines, start=2):
            record = object_of(text)
            if isinstance(record.get("number"), int):
                self.found[record["number"]] = record
            elif text.endswith(b"\n"):
                raise UserError(
                    f"--output {path}, line {number} is no line of rwkv-peft eval; delete that line, or choose another "
                    "name"
                )

    def write(self, path: Path) -> None:
        write_text(path, "".join(map(line, [{HEAD: self.settings}, *self.ordered()])))


def line(record: Record, default: Callable[[object], object] | None = None) -> str:
    return json.dumps(record, ensure_ascii=False, default=default) + "\n"


def change(name: str, before: Any, now: Any) -> str:
    """Words for a setting with another value, or for files with other stamps."""
    if name == "files" and isinstance(before, dict):
        return "other files: " + ", ".join(path for path in {**before, **now} if before.get(path) != now.get(path))
    return f"{name}: {before!r}, and now {now!r}"


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
    results["config"] = {name: getattr(args, name) for name in ("model", "adapter", "state", "shots", "limit")}
    samples = results.pop("samples")
    if args.output:
        write_text(args.output, json.dumps(results, indent=2, default=plain, ensure_ascii=False) + "\n")
    if args.samples:
        records = ({"task": task} | sample for task, found in samples.items() for sample in found)
        write_text(args.samples, "".join(line(record, plain) for record in records))
    print(tables(results))
    return 0


def check_outputs(args: Any, names: Sequence[str], *outputs: str) -> None:
    """Raise UserError for outputs that are inputs, are the same file, or cannot be written."""
    inputs = [(f"--{name}", getattr(args, name)) for name in names]
    inputs += [("--adapter", path) for path in args.adapter]
    given = [(name, path) for name in outputs if (path := getattr(args, name))]
    for name, path in given:
        check_output(f"--{name}", path, inputs)
    if len({os.path.realpath(path) for _, path in given}) < len(given):
        raise UserError(f"--output and --samples are both {args.output}; give each a file of its own")
