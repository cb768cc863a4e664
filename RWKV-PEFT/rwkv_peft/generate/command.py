"""Continue prompts with an RWKV model: `rwkv-peft generate --help`."""

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..cli import counted
from ..data.templates import stops_of
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..files.atomic import check_output
from ..files.state_file import check_session_output
from .chat import Chat
from .decode import Step, generate, prefill
from .flags import parse_flags, unescaped
from .kept import Kept
from .loading import load_subject, resolve_device, save_state_file
from .prompts import WRITTEN, encode, read_prompt_file
from .session import Session
from .settings import Sampling
from .showing import Unheard, show
from .text import TextStream


def main(argv: list[str]) -> int:
    """Run the command -> the exit code, 130 after Ctrl-C. Raises UserError for mistakes in flags and files."""
    args, sampling = parse_flags(argv)
    try:
        return run(args, sampling)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Unheard:
        return 0


def run(args: Namespace, sampling: Sampling) -> int:
    """Run the parsed command -> the exit code."""
    resolve_device(args)
    if not args.escapes and any("\\n" in text for text in [*(args.prompt or ()), args.system or "", *args.stop]):
        warn(r"note: \n in --prompt, --system or --stop is a backslash and an n; add --escapes to read it as a newline")
    check_outputs(args)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal's encoding may lack a character
    rows = read_rows(args)
    if args.save_state and len(rows) > 1:
        raise UserError(f"--save_state keeps the state after one prompt, and there are {len(rows)}; give one")
    model, start, tokenizer = load_subject(args, warn)
    if args.chat:
        change: Callable[[str], str] = unescaped if args.escapes else str
        stops = [*stops_of("Assistant:"), *args.stop]
        session = Session(model, tokenizer, sampling, start)
        inputs = [*inputs_of(args), ("--state", args.state)]
        return Chat(session, stops, args.max_tokens, change, inputs, args.think or "", args.system or "").run()
    prompts = [encode(tokenizer, row["prompt"], number) for number, row in enumerate(rows)]
    streams = len(rows) == 1 and not args.output
    continuations = [
        Continuation(row, tokenizer, args.stop or stops_of(row["prompt"]), show if streams else None) for row in rows
    ]
    steps = generate(
        model,
        prompts,
        sampling,
        args.max_tokens,
        lambda number, token: continuations[number].feed(token),
        start,
        args.batch,
        tokenizer.vocab_size,
    )
    began = time.perf_counter()
    kept = Kept(args.output, warn)
    try:
        with kept:
            complete_all(steps, continuations, not (streams or args.output), kept)
    finally:  # after Ctrl-C too
        if kept.whole:
            total, seconds = sum(len(c.tokens) for c in continuations), time.perf_counter() - began
            done = f"{len(kept.lines)} of {counted(len(rows), 'prompt')}"
            warn(f"{args.output}: {done}, {total:,} tokens, {total / seconds:.1f} tokens/s")
    if streams:
        show("\n")
    if args.save_state:
        read = prompts[0] + continuations[0].shown_tokens()
        save_state_file(args.save_state, prefill(model, [read], start)[1], model)
    return 0


class Continuation:
    """The continuation of one prompt: its row, the tokens and the text so far, and why it ended.

    end is "end" (of the document), "stop" or "length", "" before it ended. show, if given, is called with each piece of
    text.
    """

    def __init__(
        self,
        row: dict[str, Any],
        tokenizer: Tokenizer,
        stops: Iterable[str],
        show: Callable[[str], object] | None = None,
    ) -> None:
        self.row, self.show = row, show
        self.tokens: list[int] = []
        self.text, self.end = "", ""
        self._tokenizer, self._stream = tokenizer, TextStream(tokenizer, stops)
        self._lengths = [0]  # [n]: the length of the text after n tokens, withheld text included

    def feed(self, token: int) -> str:
        """Take a token -> a reason to end here, or ""."""
        self.tokens.append(token)
        if token == self._tokenizer.end_id:
            return "end"
        self._add(self._stream.feed(token))
        if self._stream.stopped:
            return "stop"
        self._lengths.append(len(self.text) + len(self._stream.held))
        return ""

    def finish(self, end: str) -> None:
        self._add(self._stream.finish())
        self.end = "stop" if self._stream.stopped else end

    def line(self) -> str:
        """The row and the fields of WRITTEN as a line of JSON."""
        found = dict(zip(WRITTEN, (self.text, len(self.tokens), self.end)))
        return json.dumps(self.row | found, ensure_ascii=False) + "\n"

    def shown_tokens(self) -> list[int]:
        """The tokens of the text, without a stop text or the end of the document after it. If a stop text began inside
        a token, the part of that token before it is encoded by itself."""
        if self.end != "stop":
            return self.tokens[: len(self._lengths) - 1]
        length = max(length for length in self._lengths if length <= len(self.text))
        return self.tokens[: self._lengths.index(length)] + self._tokenizer.encode(self.text[length:])

    def _add(self, text: str) -> None:
        self.text += text
        if self.show and text:
            self.show(text)


def read_rows(args: Namespace) -> list[dict[str, Any]]:
    """Read [{"prompt": text, …}] from the flags; [] with --chat."""
    if args.prompt_file is not None:
        return read_prompt_file(args.prompt_file)
    return [{"prompt": text} for text in args.prompt or ()]


def warn(text: str) -> None:
    print(text, file=sys.stderr)


def complete_all(steps: Iterable[Step], continuations: Sequence[Continuation], prints: bool, kept: Kept) -> None:
    """Run all steps, and add the line of each continuation to kept when it is complete. If `prints`, print the lines in
    the order of the prompts, each as soon as it and those before it are complete."""
    printed = 0

    def finish(number: int, end: str) -> None:
        nonlocal printed
        continuations[number].finish(end)
        kept.add(number, continuations[number].line())
        while prints and printed < len(continuations) and continuations[printed].end:
            show(continuations[printed].line())
            printed += 1

    for step in steps:
        if step.end:
            finish(step.number, step.end)
    for number, continuation in enumerate(continuations):
        if not continuation.end:  # with --max_tokens 0
            finish(number, "length")


def check_outputs(args: Namespace) -> None:
    """Raise UserError, before any work, for outputs that are inputs or cannot be written."""
    inputs = inputs_of(args)
    if args.output:
        check_output("--output", args.output, [*inputs, ("--state", args.state)])
    if args.save_state:  # a session may go on in its own file
        check_session_output("--save_state", args.save_state)
        check_output("--save_state", args.save_state, inputs)
    if args.output and args.save_state and os.path.realpath(args.output) == os.path.realpath(args.save_state):
        raise UserError(f"--output and --save_state are both {args.output}; give each a file of its own")


def inputs_of(args: Namespace) -> list[tuple[str, str | None]]:
    """The (flag, path) pairs of the files that are read, except --state."""
    inputs = [(f"--{name}", getattr(args, name)) for name in ("model", "prompt_file", "lora_init", "tokenizer")]
    return inputs + [("--adapter", path) for path in args.adapter]
