"""Continue prompts with an RWKV model: `rwkv-peft generate --help`."""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..checkpoints.atomic import CannotWrite, append_text, check_output, telling_failures, write_text
from ..checkpoints.state_file import check_session_output
from ..cli.errors import UserError
from ..cli.parser import counted
from ..data.chat import stops_of
from ..data.feedback import FeedbackFile, check_feedback_file, scaled
from ..data.recorded import chat_beside, note_on_chats
from .chat import ChatLoop, ChatTools, Session, remark, show
from .decode import complete
from .flags import note_escapes, parse_flags, unescaped
from .forward import prefill
from .loading import Subject, load_subject, resolve_device, save_state_file
from .prompts import encode, read_prompt_file
from .settings import Sampling
from .text import Continuation


def main(argv: list[str]) -> int:
    """Run the command -> the exit code, 130 after Ctrl-C. Raises UserError for mistakes in flags and files."""
    args, sampling = parse_flags(argv)
    try:
        return run(args, sampling)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def run(args: Namespace, sampling: Sampling) -> int:
    resolve_device(args.device)
    note_escapes(args, "--prompt, --system or --stop", [*(args.prompt or ()), args.system or "", *args.stop])
    check_outputs(args)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal's encoding may lack a character
    if args.chat:
        with ChatTools.open(args.tools) as tools:
            return chat(args, load_subject(args, remark), sampling, tools)
    given, file = args.prompt or (), args.prompt_file
    rows = [{"prompt": text} for text in given] if file is None else read_prompt_file(file)
    if args.save_state and len(rows) > 1:
        raise UserError(f"--save_state keeps the state after one prompt, and there are {len(rows)}; give one")
    subject = load_subject(args, remark)
    tokenizer = subject.tokenizer
    prompts = [encode(tokenizer, row["prompt"], number) for number, row in enumerate(rows)]
    streams = len(rows) == 1 and not args.output
    continuations = [
        Continuation(row, tokenizer, args.stop or stops_of(row["prompt"]), show if streams else None) for row in rows
    ]
    began = time.perf_counter()
    output, prints = OutputFile(args.output), not (streams or args.output)
    printed = 0  # lines, in the order of the prompts
    try:
        with output:
            for number in complete(subject, prompts, continuations, sampling, args.max_tokens, args.batch):
                output.add(number, continuations[number].line())
                while prints and printed < len(rows) and continuations[printed].end:
                    show(continuations[printed].line())
                    printed += 1
    finally:  # after Ctrl-C too
        for continuation in continuations[printed:] if prints else ():
            if continuation.end:
                show(continuation.line())
        if output.whole:
            total, seconds = sum(len(c.tokens) for c in continuations), time.perf_counter() - began
            done = f"{len(output.lines)} of {counted(len(rows), 'prompt')}"
            remark(f"{args.output}: {done}, {total:,} tokens, {total / seconds:.1f} tokens/s")
    if streams:
        show("\n")
    if args.save_state:
        read = prompts[0] + continuations[0].shown_tokens()
        save_state_file(args.save_state, prefill(subject.model, [read], subject.start)[1], subject.model)
    return 0


def chat(args: Namespace, subject: Subject, sampling: Sampling, tools: ChatTools) -> int:
    """Run the chat of --chat -> the exit code."""
    convert: Callable[[str], str] = unescaped if args.escapes else str
    files = (*reversed(args.adapter), args.state, args.model)
    if note := note_on_chats(*files):
        remark(note)
    session = Session(subject.model, subject.tokenizer, sampling, subject.start)
    stops = [*stops_of("Assistant:"), *args.stop]
    layout = chat_beside(*files, clean=args.clean_turns, tool_form=args.tool_form)
    layout = replace(layout, think=args.think or "")
    inputs = [*inputs_of(args), ("--state", args.state)]
    loop = ChatLoop(session, stops, args.max_tokens, convert, inputs, layout, args.system or "", tools)
    if args.feedback:
        loop.feedback = FeedbackFile(args.feedback, subject.tokenizer, args.max_tokens)
        loop.origin = args.model, " ".join(map(scaled, args.adapter, args.scales))
    return loop.run()


def check_outputs(args: Namespace) -> None:
    """Raise UserError, before any work, for outputs that are inputs or cannot be written."""
    inputs = inputs_of(args)
    if args.output:
        check_output("--output", args.output, [*inputs, ("--state", args.state)])
    if args.feedback:
        check_feedback_file(args.feedback, [*inputs, ("--state", args.state)])
    if args.save_state:  # a session may go on in its own file
        check_session_output("--save_state", args.save_state)
        check_output("--save_state", args.save_state, inputs)
    if args.output and args.save_state and os.path.realpath(args.output) == os.path.realpath(args.save_state):
        raise UserError(f"--output and --save_state are both {args.output}; give each a file of its own")


def inputs_of(args: Namespace) -> list[tuple[str, str | None]]:
    """The (flag, path) pairs of the files that are read, except --state."""
    names = ("model", "prompt_file", "lora_init", "tokenizer", "tools")
    return [(f"--{name}", getattr(args, name)) for name in names] + [("--adapter", path) for path in args.adapter]


class OutputFile:
    """The lines {number of a prompt: line} of --output; without a path there are none.

    Each line is appended as soon as its continuation is done, so that a process which is killed leaves the lines so
    far; on exit the file is written anew in the order of the prompts, and `whole` becomes True. Earlier content stays
    until the first line. Raises UserError if the disk refuses a line.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.lines: dict[int, str] = {}
        self.whole = False

    def __enter__(self) -> "OutputFile":
        return self

    def add(self, number: int, line: str) -> None:
        """Add the line of a prompt."""
        if self.path is None:
            return
        if self.lines:
            with telling_failures(Path(self.path), "the lines before are kept"):
                append_text(self.path, line)
        else:
            write_text(self.path, line)
        self.lines[number] = line

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.path is None or not self.lines or (kind is not None and issubclass(kind, CannotWrite)):
            return
        write_text(self.path, "".join(self.lines[number] for number in sorted(self.lines)))
        self.whole = True
