"""Turn the body of a request into what the engine answers: tokens of prompts, samplings, texts that end an answer."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...cli.errors import UserError
from ...data.templates import segments, stops_of
from ...data.tokenizer import Tokenizer
from ...data.turns import OPENINGS
from ..prompts import encode
from ..settings import Sampling
from .forms import Asked, ChatAsked, TextAsked
from .gate import Refused

SEEDS = 1 << 48  # of requests that name none
LONG = 16  # characters for each token that a prompt may have: longer texts are refused before they are tokenized


class Prompt(NamedTuple):
    """Tokens to continue. The state after each of `marks` of them is worth keeping."""

    tokens: list[int]
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """Limits of a request: answers at once, tokens of a prompt and of an answer, tokens that the model knows. clean:
    whether the words of users, systems and tools are cleaned."""

    answers: int
    prompt: int
    tokens: int
    vocabulary: int
    clean: bool = True

    def judge_length(self, *texts: str) -> None:
        """Raise Refused for the texts of a prompt that would take long to tokenize, and be refused then."""
        if (length := sum(map(len, texts))) > LONG * self.prompt:
            raise too_long(f"{length:,} characters", self)


class Asking(NamedTuple):
    """A request that may be answered: its prompts, how each of the `times` answers to each is drawn (answer i with
    seed + i), the texts that end it, its length, and how many most probable tokens are told."""

    prompts: Sequence[Prompt]
    times: int
    sampling: Sampling
    stops: tuple[str, ...]
    max_tokens: int
    odds: int | None


def asking_of(form: TextAsked | ChatAsked, tokenizer: Tokenizer, defaults: Sampling, bounds: Bounds) -> Asking:
    """Read a request. Raises Refused for what cannot be answered, and for too much before it is tokenized."""
    times, number = form.n or 1, 1 if isinstance(form, ChatAsked) else len(form.prompts)
    if number * times > bounds.answers:
        raise Refused(400, f"{number * times} answers in one request, and {bounds.answers} may be: ask for fewer")
    if isinstance(form, ChatAsked):
        if (parts := len(form.messages) + len(form.tools or ())) > bounds.prompt:
            raise too_long(f"{parts:,} messages and tools", bounds)
        prompts, stops = [chat_prompt(form, tokenizer, bounds)], (*stops_of("Assistant:"), *form.stops)
        longest = form.max_completion_tokens or form.max_tokens or bounds.tokens
    else:
        prompts, stops = text_prompts(form, tokenizer, bounds), form.stops
        longest = form.max_tokens or 16
    if longest > bounds.tokens:
        raise Refused(400, f"max_tokens {longest:,}: an answer has at most {bounds.tokens:,} here", "max_tokens")
    for prompt in prompts:
        if len(prompt.tokens) > bounds.prompt:
            raise too_long(f"{len(prompt.tokens):,} tokens", bounds)
    return Asking(prompts, times, sampling_of(form, defaults), stops, longest, form.odds)


def too_long(length: str, bounds: Bounds) -> Refused:
    message = f"the prompt has {length}, and {bounds.prompt:,} tokens may be; shorten it"
    return Refused(400, message, code="context_length_exceeded")


def sampling_of(form: Asked, defaults: Sampling) -> Sampling:
    """The Sampling of a request; what it leaves out is as in defaults, but its seed is drawn."""
    given = {name: getattr(form, name) for name in Sampling.__dataclass_fields__ if hasattr(form, name)}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return replace(defaults, **{"seed": secrets.randbelow(SEEDS), **given})
    except UserError as error:
        message = str(error).removeprefix("--")
        raise Refused(400, message, message.partition(" ")[0]) from error


def chat_prompt(form: ChatAsked, tokenizer: Tokenizer, bounds: Bounds) -> Prompt:
    """Lay out messages as chat data is, up to the opening of the answer, each part tokenized by itself."""
    try:
        turns = [*form.messages, {"role": "assistant", "content": ""}]
        parts = segments({"messages": turns, "tools": form.tools if form.calls else None}, clean=bounds.clean)[:-1]
        texts = [text for text, _ in parts]
        texts[-1] += OPENINGS.get(form.think or "", "")
        bounds.judge_length(*texts)
        encoded = [tokenizer.encode(text) for text in texts]
    except UserError as error:
        raise Refused(400, str(error), "messages") from error
    tokens = [token for part in encoded for token in part]
    begins = sum(map(len, encoded[:2]))  # the system text, which other chats have in common
    return Prompt(tokens, (begins,) if texts[0].startswith("System:") and begins < len(tokens) else ())


def text_prompts(form: TextAsked, tokenizer: Tokenizer, bounds: Bounds) -> list[Prompt]:
    prompts = []
    for number, one in enumerate(form.prompts):
        if isinstance(one, str):
            bounds.judge_length(one)
        try:
            tokens = encode(tokenizer, one, number) if isinstance(one, str) else list(one)
        except UserError as error:
            raise Refused(400, str(error), "prompt") from error
        if not tokens or max(tokens) >= bounds.vocabulary:
            raise Refused(400, f"prompt {number}: tokens from 0 to {bounds.vocabulary - 1} are due", "prompt")
        prompts.append(Prompt(tokens))
    return prompts
