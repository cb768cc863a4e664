"""An interactive chat in the layout of the training data (data/chat.py): `rwkv-peft generate --chat`.

Lines come from standard input, a terminal or a pipe; answers stream to standard output, remarks to standard error.
"""

import os
import random
import shlex
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

import torch

from ..checkpoints.atomic import check_output, same_file
from ..checkpoints.state_file import check_session_output
from ..cli.errors import UserError, short
from ..data.chat import LEADS, THINK, THINK_CLOSES, TURN_END, ChatLayout, shown_opening
from ..data.feedback import Answered, FeedbackFile
from ..data.tokenizer import Tokenizer
from ..data.tools import ToolCall, parse_calls
from ..environments.environments import Environments, FailedRequest, Place
from ..models.parts import LanguageModel
from ..models.state import State
from .decode import GeneratedToken, TokenCollector, damaged_error
from .engine import Engine
from .forward import prefill
from .loading import save_state_file
from .prompts import read_tools
from .requests import Completion, GenerationRequest
from .settings import Sampling
from .speakers import Speaker
from .text import TextStream
from .thinking import constraint_behind

HELP = (
    "/reset forgets the chat, /save FILE keeps it for --state, /tool TEXT is the result of a call, /exit or Ctrl-D "
    "ends it; Ctrl-C ends an answer, twice the chat; with --feedback /good and /bad mark the answer, /fix TEXT "
    "replaces it"
)
CODE = 130  # the exit code after Ctrl-C
DIM, PLAIN = "\x1b[2m", "\x1b[22m"  # a terminal shows a thinking between them
IN_A_ROW = 8  # answers to a line, of which all but the last call tools


class Session:
    """One sequence in turns: a model's State after all of them, from `start` on (None: zeros), so that no token is read
    twice.

    Between turns the sequence ends in TURN_END, as in the training data, or gets it before the next turn: `tail` has
    the tokens that were sampled but not read yet, and `closed` is True if the sequence with them ends in TURN_END.
    `cut` is True if the last answer used all of its max_tokens.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, sampling: Sampling, start: State | None = None
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.start = model, tokenizer, sampling, start
        self.random = random.Random(sampling.seed)
        self.reset()

    def reset(self) -> None:
        """Forget every turn."""
        self.state, self.closed = self.start, True
        self.before = self.start  # the State before the last turn
        self.tail: list[int] = []
        self.cut = False

    @property
    def begins(self) -> bool:
        """True before the first turn."""
        return self.state is self.start

    def close(self) -> None:
        """Read the tokens that the last turn left and its TURN_END, so that the state includes them."""
        if not self.closed:
            self.tail += self.tokenizer.encode(TURN_END)
            self.closed = True
        if self.tail:
            self.state = prefill(self.model, [self.tail], self.state)[1]
            self.tail = []

    def rewrite(self, texts: Iterable[str]) -> None:
        """Go on as if the last question had another answer; texts are both, as in `answer`."""
        self.state, self.closed = self.before, False
        self.tail = [token for text in texts for token in self.tokenizer.encode(text)]
        self.close()

    @torch.inference_mode()
    def answer(self, texts: Iterable[str], stops: Iterable[str], max_tokens: int) -> Generator[str, None, None]:
        """Read texts, each tokenized by itself as in training data, and yield the answer piece by piece.

        The answer ends before a stop text, at the token that ends a document, or after max_tokens. If the caller stops
        iterating, the sequence has the part sampled so far. Raises UserError if the logits are not finite.
        """
        self.close()
        texts, self.before = list(texts), self.state
        tokens = [token for text in texts for token in self.tokenizer.encode(text)]
        stream, shown, self.cut = TextStream(self.tokenizer, stops), "", False
        turn_end: tuple[str, State] | None = None  # the last text that ends in TURN_END, and the State after it
        whole_turn: State | None = None
        found = deque[GeneratedToken]()
        collector = TokenCollector(0, found, None, 0)
        engine = Engine(min(self.tokenizer.vocab_size, self.model.config.vocab_size), 1)
        constraint = constraint_behind("".join(texts), self.tokenizer, engine.vocab_size)
        completion = Completion(self.sampling, max_tokens + 1, collector, constraint=constraint, draws=self.random)
        engine.add(GenerationRequest(Speaker("", self.model, self.state), tokens, [completion]))
        try:
            for _ in range(max_tokens):
                engine.step()
                if collector.damaged:
                    raise damaged_error(self.model, 0, collector.length)
                if (whole := shown + stream.held).endswith(TURN_END):
                    turn_end = whole, engine.batches[self.model].snapshot(0)[1]
                token, self.tail = found.pop().token, []
                if token == self.tokenizer.end_id:
                    break
                self.tail = [token]
                text = stream.feed(token)
                shown += text
                if text:
                    yield text
                if stream.stopped:
                    self.tail = []
                    if turn_end is not None and turn_end[0] == shown + TURN_END:
                        whole_turn = turn_end[1]  # without the words that open the next turn
                    return
            else:
                self.cut = True
        finally:
            if (batch := engine.batches.get(self.model)) is not None:
                self.closed = whole_turn is not None
                self.state = batch.snapshot(0)[1] if whole_turn is None else whole_turn
                if not batch.unread:  # an interrupt came after its reading
                    self.tail = []
        rest = stream.finish()
        self.closed = (shown + rest).endswith(TURN_END)
        if rest:
            yield rest


class ChatTools:
    """The tools of a chat, the functions `listed`. With an environment, an instance of a class with the tools as
    methods, calls are run there; without, the user gives their results."""

    def __init__(self, listed: Sequence[Mapping[str, Any]], environments: Environments | None = None) -> None:
        self.listed, self.environments = list(listed), environments
        self.place: Place | None = None
        self.opening = ""  # the end of the first question, which the environment's reset returned
        self.begin()

    @classmethod
    @contextmanager
    def open(cls, value: str | None) -> "Iterator[ChatTools]":
        """Within, have the ChatTools of --tools: a file of JSON, FILE.py:CLASS or module:CLASS. Raises UserError for
        tools that cannot be read, and for a class that cannot serve a chat."""
        if not value or ":" not in value or os.path.exists(value):
            yield cls(read_tools(value) if value else [])
            return
        with Environments.open([value], flag="--tools") as environments:
            (found,) = environments.known.values()
            if found.required:
                raise UserError(
                    f"--tools {value}: its reset takes {', '.join(found.required)}, and a chat has no row with such "
                    "fields; give each parameter a default"
                )
            yield cls(found.tools, environments)

    def begin(self) -> None:
        """Begin a conversation in the environment, if there is one."""
        if self.environments is None:
            return
        self.environments.release([self.place] if self.place else [])
        (self.place,), (opening,) = self.environments.begin([{}])
        if isinstance(opening, FailedRequest):
            raise UserError(f"--tools: reset(): {opening.message}; mend the class")
        self.opening = opening

    def run(self, calls: Sequence[ToolCall]) -> list[str]:
        """Run calls, one after the other -> their results, [] without an environment."""
        if self.environments is None or self.place is None:
            return []
        try:
            return [self.environments.call([self.place], [call])[0] for call in calls]
        except KeyboardInterrupt:
            self.place.end("its conversation was interrupted, and is lost")
            raise


class ChatLoop:
    """The loop of a chat over a Session.

    stops end an answer; convert(line) is applied to each line; inputs are the (flag, path) pairs that /save must not
    overwrite, except --state, because a session may go on in its own file. system and the list of tools come before
    the first turn, also after /reset. If an answer calls tools, as many results are due before the next one. feedback
    takes what is said of answers by a model and adapters, the files in `origin`; None for nothing.
    """

    feedback: FeedbackFile | None = None
    origin = ("", "")

    def __init__(
        self,
        session: Session,
        stops: Sequence[str],
        max_tokens: int,
        convert: Callable[[str], str],
        inputs: Sequence[tuple[str, str | None]],
        layout: ChatLayout,
        system: str,
        tools: ChatTools,
    ) -> None:
        self.session, self.stops, self.max_tokens, self.convert = session, stops, max_tokens, convert
        self.inputs = [(flag, path) for flag, path in inputs if flag != "--state"]
        self.replaceable = [path for flag, path in inputs if flag == "--state" and path]
        self.layout, self.system, self.tools = layout, system, tools
        self.awaited, self.results = 1, list[str]()
        self.turns, self.texts, self.whole = list[dict[str, str]](), list[str](), False

    def run(self) -> int:
        """Answer lines until the input ends -> the exit code. A UserError is printed on a terminal, and raised if the
        lines come from a pipe or a file."""
        remark(HELP)
        read, interrupted = line_reader(), False
        while True:
            try:
                line = read()
                if line is None:
                    return 0
                interrupted = False
                if line.startswith("/"):
                    if not self.command(*line.split(maxsplit=1)):
                        return 0
                elif line.strip():
                    self.answer(self.convert(line))
            except KeyboardInterrupt:
                if interrupted:
                    remark("\ninterrupted")
                    return CODE
                interrupted = True
                remark("\n(Ctrl-C again ends the chat)")
            except UserError as error:
                if not sys.stdin.isatty():
                    raise
                remark(f"error: {error}")

    def answer(self, words: str) -> None:
        if self.session.begins:
            words += self.tools.opening
            self.turns = [{"role": "system", "content": self.system}] if self.system.strip() else []
            texts = self.layout.question(words, self.system, self.tools.listed)
        else:
            texts = self.layout.question(words)
        self.turns.append({"role": "user", "content": words})
        self.reply(texts)

    def take_result(self, text: str) -> None:
        """Collect the result of a call, and answer once all are there."""
        self.results.append(text)
        if len(self.results) < self.awaited:
            remark(f"(call {len(self.results) + 1} of {self.awaited}: its result?)")
            return
        self.reply(self.after_tools(self.results))

    def after_tools(self, results: Sequence[str]) -> list[str]:
        """The texts of calls' results and of the opening of the answer to them."""
        turns = [{"role": "tool", "content": result} for result in results]
        self.turns += turns
        return self.layout.prompt(turns)

    def reply(self, texts: Sequence[str]) -> None:
        """Print the answer to texts. If it calls tools that can be run, print and read their results, and go on, for
        IN_A_ROW answers at most."""
        for left in reversed(range(IN_A_ROW)):
            calls = self.next_answer(texts)
            results = self.tools.run(calls) if left else []
            for number, call in enumerate(calls, start=1):
                rest = f"its result: {results[number - 1]}" if results else "/tool TEXT is its result"
                remark(f"(call {number} of {len(calls)}: {call}; {rest})")
            if not results:
                return
            texts = self.after_tools(results)

    def next_answer(self, texts: Sequence[str]) -> list[ToolCall]:
        """Print the answer to texts -> its calls."""
        self.results, shown, self.texts, self.whole = [], list[str](), list(texts), False
        speaker, colon, opening = texts[-1].partition(":")
        dims = opening == THINK["on"].opening and sys.stdout.isatty()
        show(speaker + colon + DIM * dims + opening)
        try:
            # closed before an interrupt is handled, because another one may come then
            with closing(self.session.answer(texts, self.stops, self.max_tokens)) as pieces:
                for text in pieces:
                    shown.append(text)
                    ends = dims and THINK_CLOSES in "".join(shown)
                    dims = dims and not ends
                    show(text + PLAIN * ends)
            self.whole = not self.session.cut
        finally:
            show(PLAIN * dims + "\n\n")
            words = LEADS[self.layout.think].sub("", "".join(shown), 1)
            self.turns.append({"role": "assistant", "content": (shown_opening(self.layout.think) + words).strip()})
        _, calls = parse_calls(opening + "".join(shown))  # nothing is called in a thinking
        self.awaited = max(1, len(calls))
        if self.session.cut:
            remark(f"(cut off after --max_tokens {self.max_tokens})")
        return calls

    def command(self, name: str, argument: str = "") -> bool:
        """Run a line that begins with / -> False if it ends the chat."""
        argument = argument.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name == "/reset":
            self.session.reset()
            self.tools.begin()
            self.awaited, self.results, self.turns = 1, [], []
            remark("the chat is forgotten")
        elif name == "/tool" and argument and not self.session.begins:
            self.take_result(self.convert(argument))
        elif name == "/save" and argument:
            self.save(argument)
        elif name in ("/fix", "/good", "/bad") and (argument or name != "/fix"):
            self.judge(name, self.convert(argument))
        else:
            remark(HELP)
        return True

    def judge(self, name: str, better: str) -> None:
        """Write what is said of the last answer; a better one takes its place. A UserError is printed, and the chat
        goes on."""
        try:
            if self.feedback is None:
                raise UserError(f"{name} writes rows to train on; start the chat with --feedback FILE.jsonl")
            if not self.turns:
                raise UserError(f"{name}: nothing was answered yet")
            *turns, answer = self.turns
            answered = Answered(turns, answer, *self.origin, self.tools.listed, self.whole)
            if name == "/fix":
                self.feedback.correct(answered, better)
                opening, words = self.layout.answer(better, {})
                speaker, colon, _ = self.texts[-1].partition(":")
                self.session.rewrite([*self.texts[:-1], speaker + colon + opening, words])
                self.turns[-1], self.whole = {"role": "assistant", "content": better.strip()}, True
            else:
                self.feedback.judge(answered, name == "/good")
            remark(f"noted in {self.feedback.path}")
        except UserError as error:
            remark(f"error: {error}")

    def save(self, path: str) -> None:
        """Write the state after the last turn. A UserError is printed, and the chat goes on."""
        try:
            check_session_output("/save", path)
            check_output("/save", path, self.inputs)
            self.session.close()
            if self.session.state is None:
                raise UserError("/save: nothing was said yet")
            self.check_replaced(path)
            save_state_file(path, self.session.state, self.session.model)
            remark(f"saved; rwkv-peft generate --chat --state {shlex.quote(path)} goes on from here")
        except UserError as error:
            remark(f"error: {error}")

    def check_replaced(self, path: str) -> None:
        """Raise UserError, once for each path, if /save would replace a file of somebody else's."""
        own_file = any(same_file(path, own) for own in self.replaceable)
        self.replaceable.append(path)
        if os.path.exists(path) and not own_file:
            raise UserError(f"/save {path}: there is such a file; the same line once more replaces it")


def line_reader() -> Callable[[], str | None]:
    """A function that reads a line without its newline, None at the end of the input.

    On a terminal it prompts, with editing if there is readline. It raises UserError for a line that is not in the
    input's encoding.
    """
    if not sys.stdin.isatty():
        return lambda: readable(line.rstrip("\r\n")) if (line := sys.stdin.readline()) else None
    with suppress(ImportError):  # some Pythons lack it
        import readline  # noqa: F401  the import lets input() edit lines

    def typed() -> str | None:
        try:
            return readable(input("User: "))
        except EOFError:
            show("\n")
            return None

    return typed


def readable(line: str) -> str:
    """The line, unchanged. Raises UserError if it has surrogates: bytes that are not in the input's encoding."""
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the line {short(line[: error.start])}… is not {sys.stdin.encoding} from its character {error.start + 1} "
            "on, and was not sent; convert it"
        ) from error
    return line


def show(text: str) -> None:
    """Print a piece of generated text."""
    print(text, end="", flush=True)


def remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
