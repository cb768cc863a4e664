"""Prompts in every form that Model.generate takes; the completions that it returns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

from ..cli.errors import UserError, quoted
from ..cli.names import is_whole
from ..data.chat import LEADS, TURN_END, ChatLayout, begins_answer, shown_opening, stops_of
from ..data.tokenizer import Tokenizer
from ..inference.decode import GeneratedToken
from ..inference.prompts import encode
from ..inference.text import Continuation
from ..models.state import State

MESSAGES = "messages"  # the field of a prompt with tools beside it


class EncodedPrompt(NamedTuple):
    """The tokens of a prompt; stops: the texts that end its completion; closing: the tokens that close the turn of a
    chat after it ([] of other prompts). think is a key of LEADS. `opening` is the end of the prompt that is shown with
    the text."""

    tokens: list[int]
    stops: tuple[str, ...]
    closing: list[int] = []
    think: str | None = None
    opening: str = ""


@dataclass(frozen=True)
class CompletionOutput:
    """A completion of a prompt.

    - text: without the stop text that ended it
    - tokens: all that were sampled, including a stop text's or the end of the document
    - logprobs: the log-probability of each token, before penalties and temperature; 0 unless details or top_logprobs
      is given
    - top_logprobs: the most probable tokens at each place, (token, log-probability) each
    - end: "end" (of the document), "stop" or "length"
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    end: str
    compute_state: Callable[[], State] = field(repr=False, compare=False)

    @cached_property
    def state(self) -> State:
        """The State of one sequence after prompt and text, and after the blank line that ends the turn if the prompt is
        messages. It is computed at first use; `state=` of the next call goes on from it."""
        return self.compute_state()


class Piece(NamedTuple):
    """A piece of the completion of this number: n times the prompt's number plus its own.

    end is "" while it goes on, and in its last piece the reason: "end" (of the document), "stop" or "length"; that
    piece has the whole completion. tokens: those sampled since the piece before."""

    number: int
    text: str
    end: str = ""
    tokens: tuple[GeneratedToken, ...] = ()
    completion: CompletionOutput | None = None


class PendingCompletion:
    """A completion while it is sampled: its number, its prompt and its text so far; read(tokens) -> the State after
    them."""

    def __init__(
        self, number: int, prompt: EncodedPrompt, text: Continuation, read: Callable[[list[int]], State]
    ) -> None:
        self.number, self.prompt, self.text, self.read = number, prompt, text, read
        self.sampled: list[GeneratedToken] = []
        self.characters = self.tokens = 0  # in the pieces so far

    def add(self, token: GeneratedToken) -> Piece | None:
        """Take a token that the text has been fed with -> the Piece that is certain now, None without new text."""
        self.sampled.append(token)
        if token.end:
            return self.finish(token.end)
        return self._piece() if len(self._shown()) > self.characters else None

    def finish(self, end: str) -> Piece:
        """End for this reason -> the last Piece."""
        self.text.finish(end)
        return self._piece(self._output())

    def _shown(self) -> str:
        """The text so far, as serve shows it: of an answer without its lead."""
        lead = LEADS[self.prompt.think].match(self.text.text)
        return self.prompt.opening + self.text.text[lead.end() if lead else 0 :]

    def _piece(self, output: CompletionOutput | None = None) -> Piece:
        shown, new = self._shown(), tuple(self.sampled[self.tokens :])
        text = shown[self.characters :]
        self.characters, self.tokens = len(shown), len(self.sampled)
        return Piece(self.number, text, self.text.end, new, output)

    def _output(self) -> CompletionOutput:
        tokens = [one.token for one in self.sampled]
        read = self.prompt.tokens + self.text.shown_tokens() + self.prompt.closing
        logprobs, top = [one.logprob for one in self.sampled], [one.top for one in self.sampled]
        return CompletionOutput(self._shown(), tokens, logprobs, top, self.text.end, partial(self.read, read))


def prompts_in(argument: Any) -> tuple[list[Any], bool]:
    """(the prompts of an argument, True if it is a single one): a text, tokens, messages, or {"messages", "tools"}."""
    if hasattr(argument, "tolist"):  # a tensor or an array
        argument = argument.tolist()
    if not isinstance(argument, Iterable):  # a list of it would be a prompt of one token
        raise UserError(f"prompts: {quoted(argument)} is no prompt; a text, token ids, or messages are due")
    if isinstance(argument, (str, Mapping)):
        return [argument], True
    prompts = list(argument)
    first = prompts[0] if prompts else None
    alone = is_whole(first) or (isinstance(first, Mapping) and MESSAGES not in first)
    return ([prompts], True) if alone else (prompts, False)


def encode_prompt(prompt: Any, number: int, tokenizer: Tokenizer, vocab_size: int, layout: ChatLayout) -> EncodedPrompt:
    """The EncodedPrompt of the prompt of this number. Messages are laid out. Their parts are tokenized by themselves,
    as in training and by serve. Raises UserError for anything that is no prompt."""
    if isinstance(prompt, str):
        return EncodedPrompt(encode(tokenizer, prompt, number), stops_of(prompt))
    row = prompt if isinstance(prompt, Mapping) else {MESSAGES: prompt}
    turns = row.get(MESSAGES)
    if isinstance(turns, Sequence) and turns and all(isinstance(turn, Mapping) for turn in turns):
        texts = layout.prompt([dict(turn) for turn in turns], row.get("tools"))
        tokens = [token for text in texts for token in tokenizer.encode(text)]
        think = None if begins_answer(turns[-1]) else layout.think
        closing = tokenizer.encode(TURN_END)
        return EncodedPrompt(tokens, stops_of("Assistant:"), closing, think, shown_opening(layout.think))
    tokens = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(tokens, Sequence) and all(is_whole(token, 0) and token < vocab_size for token in tokens):
        return EncodedPrompt(list(tokens), stops_of(tokenizer.decode(tokens)))
    raise UserError(
        f"prompts: {quoted(prompt)} is no prompt; a text, token ids from 0 to {vocab_size - 1}, or messages "
        '({"role": "user", "content": …}) are due'
    )
