"""Completions in OpenAI's form: whole, or in chunks as they are sampled."""

import codecs
import json
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ...cli.errors import encoded
from ...data.tokenizer import Tokenizer
from ...data.tools import ToolCall, parse_calls, undecided
from ..requests import Logprobs
from ..thinking import ThinkingStream
from .web import RequestError

Fields = dict[str, Any]
UTF_8 = codecs.getincrementaldecoder("utf-8")
REASONING = "reasoning_content"  # the field of a message or a delta that holds its thinking


class Token(NamedTuple):
    """A token of a completion; logprobs are None if not requested."""

    id: int
    logprobs: Logprobs | None


class CompletionPart(NamedTuple):
    """New text and tokens of the completion of this number; end is "" while it goes on, else the reason for its end,
    and stop the stop string. Once `split`, its thinking and its calls are apart from the text."""

    number: int
    text: str
    tokens: tuple[Token, ...]
    end: str = ""
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    stop: str = ""

    @classmethod
    def joined(cls, parts: Sequence["CompletionPart"]) -> "CompletionPart":
        """All parts of a completion as one."""
        tokens = tuple(token for part in parts for token in part.tokens)
        calls = tuple(call for part in parts for call in part.calls)
        text, thinking = "".join(part.text for part in parts), "".join(part.thinking for part in parts)
        return cls(parts[0].number, text, tokens, parts[-1].end, thinking, calls, parts[-1].stop)


class Usage(NamedTuple):
    """Tokens of prompts, those of them found in the cache, tokens of completions, and those of them in thinkings."""

    prompt: int
    cached: int
    completions: int
    thinking: int

    def fields(self) -> Fields:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completions,
            "total_tokens": self.prompt + self.completions,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.thinking},
        }


class Response:
    """The envelope around completions, whole or as a stream; subclasses give the form of one, or of both."""

    prefix, whole_kind, chunk_kind = "", "", ""
    media = "text/event-stream"  # a stream's

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.head = {"id": f"{self.prefix}{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.tokenizer, self.logprobs = tokenizer, logprobs
        self.thought: dict[int, int] = {}  # tokens in the thinking of each completion
        self.notes: Fields = {}  # fields of ours
        self.begun: set[int] = set()  # completions of which a part was sent
        self.includes_usage = False

    def split_part(self, part: CompletionPart) -> CompletionPart:
        """A part with its thinking and calls apart from its text, and without text that is not certain yet."""
        return part

    def choice(self, part: CompletionPart) -> Fields:
        """A whole completion."""
        raise NotImplementedError

    def delta(self, part: CompletionPart, first: bool) -> Fields | None:
        """A part of a completion, None for an empty one; first: no part of it was sent yet."""
        raise NotImplementedError

    def whole(self, completions: Sequence[CompletionPart], usage: Usage) -> Fields:
        choices = [self.choice(part) for part in completions]
        return {**self.head, **self.notes, "object": self.whole_kind, "choices": choices, "usage": usage.fields()}

    def begin(self, usage: Usage) -> Iterator[bytes]:
        """The bytes of a stream before those of its first part."""
        return iter(())

    def events(self, part: CompletionPart) -> Iterator[bytes]:
        """The bytes of a stream for a split part."""
        if (delta := self.delta(part, part.number not in self.begun)) is not None:
            self.begun.add(part.number)
            yield self.chunk([delta])

    def ending(self, usage: Usage) -> Iterator[bytes]:
        """The bytes of a stream behind those of its last part."""
        if self.includes_usage:
            yield self.chunk([], usage)
        yield b"data: [DONE]\n\n"

    def failure(self, error: RequestError) -> bytes:
        """The bytes that end a stream for an error."""
        return event(error.body)

    def chunk(self, choices: Sequence[Fields], usage: Usage | None = None) -> bytes:
        """A server-sent event."""
        fields = {**self.head, **self.notes, "object": self.chunk_kind, "choices": list(choices)}
        return event(fields | ({} if usage is None else {"usage": usage.fields()}))

    def is_empty(self, part: CompletionPart) -> bool:
        return not (part.text or part.thinking or part.end or (part.tokens and self.logprobs))

    def spelled(self, token: int) -> tuple[str, list[int]]:
        """A token's text and bytes; a token of no whole characters has its bytes, spelled, as its text."""
        table: Sequence[bytes | None] | None = getattr(self.tokenizer, "token_bytes", None)
        if table is None:
            data = self.tokenizer.decode([token]).encode()
        else:
            data = (table[token] if token < len(table) else None) or b""
        try:
            return data.decode(), list(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


class ChatResponse(Response):
    """With `calls`, answers may call tools, and calls are reported apart from the text. With `forced`, a text without a
    call is one that a limit has cut, and not reported. With `splits`, a thinking is reported apart from the text."""

    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        logprobs: bool,
        calls: bool = False,
        forced: bool = False,
        splits: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, logprobs)
        self.calls, self.forced, self.splits = calls, forced, splits
        self.calling: dict[int, CallStream] = defaultdict(CallStream)
        self.thinking: dict[int, ThinkingStream] = defaultdict(ThinkingStream)
        self.tokens: Counter[int] = Counter()  # of each completion

    def split_part(self, part: CompletionPart) -> CompletionPart:
        whole, stream, calls = bool(part.end), self.thinking[part.number], list[ToolCall]()
        thought, text = bool(stream.thinks), part.text
        if self.splits:
            self.tokens[part.number] += len(part.tokens)
            thinking, text = stream.feed(text, whole)
            part = part._replace(thinking=thinking)
            if thought or stream.thinks or thinking:
                self.thought[part.number] = self.tokens[part.number]
        if self.calls:
            text, calls = self.calling[part.number].feed(text, whole)
        return part._replace(text="" if self.forced and not calls else text, calls=tuple(calls))

    def choice(self, part: CompletionPart) -> Fields:
        message: Fields = {"role": "assistant", "content": part.text, "refusal": None}
        if part.thinking:
            message[REASONING] = part.thinking
        if part.calls:
            message |= {"content": part.text or None, "tool_calls": call_fields(part.calls)}
        return {"index": part.number, "message": message, **self._rest(part)}

    def delta(self, part: CompletionPart, first: bool) -> Fields | None:
        if self.is_empty(part):
            return None
        delta: Fields = {"role": "assistant"} if first else {}
        delta |= {REASONING: part.thinking} if part.thinking else {}
        delta |= {"content": part.text} if part.text or not part.thinking else {}
        if part.calls:
            delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(call_fields(part.calls))]
        return {"index": part.number, "delta": delta, **self._rest(part)}

    def _rest(self, part: CompletionPart) -> Fields:
        content = [self._logprobs(token) for token in part.tokens] if self.logprobs else []
        logprobs = {"content": content, "refusal": None} if self.logprobs else None
        end = finish_reason(part.end)
        return {"logprobs": logprobs, "finish_reason": "tool_calls" if part.calls and end == "stop" else end}

    def _logprobs(self, token: Token) -> Fields:
        def one(token: int, logprob: float) -> Fields:
            text, data = self.spelled(token)
            return {"token": text, "logprob": logprob, "bytes": data}

        assert token.logprobs is not None
        return {**one(token.id, token.logprobs.logprob), "top_logprobs": [one(*pair) for pair in token.logprobs.top]}


class CompletionResponse(Response):
    prefix, whole_kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool) -> None:
        super().__init__(model, tokenizer, logprobs)
        self.lengths: dict[int, int] = defaultdict(int)  # whole characters of each completion's tokens so far
        self.decoders: dict[int, codecs.IncrementalDecoder] = defaultdict(lambda: UTF_8("replace"))

    def choice(self, part: CompletionPart) -> Fields:
        return {
            "index": part.number,
            "text": part.text,
            "logprobs": self._logprobs(part) if self.logprobs else None,
            "finish_reason": finish_reason(part.end),
        }

    def delta(self, part: CompletionPart, first: bool) -> Fields | None:
        return None if self.is_empty(part) else self.choice(part)

    def _logprobs(self, part: CompletionPart) -> Fields:
        fields: Fields = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprobs in part.tokens:
            text, data = self.spelled(token)
            top = None if logprobs is None else {self.spelled(other)[0]: logprob for other, logprob in logprobs.top}
            offset = self.lengths[part.number]
            self.lengths[part.number] += len(self.decoders[part.number].decode(bytes(data)))
            for name, value in zip(fields, (text, None if logprobs is None else logprobs.logprob, top, offset)):
                fields[name].append(value)
        return fields


class BlockResponse(ChatResponse):
    """One answer as blocks, one behind another: a thinking, words, calls. Subclasses give a block's form and events;
    `index` is the number of the block that is written, and `items` are those that are whole."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.kind, self.content, self.index = "", "", 0
        self.items: list[Fields] = []
        self.ended: CompletionPart | None = None

    def block(self, kind: str, content: Any) -> Fields:
        """A whole block of a kind: "thinking" or "text", with a text as its content, or "call", with a ToolCall."""
        raise NotImplementedError

    def opened(self, kind: str, content: Any) -> Iterator[bytes]:
        """The events that begin a block; those of a call know it already."""
        raise NotImplementedError

    def added(self, kind: str, content: Any) -> Iterator[bytes]:
        """The events of new content."""
        raise NotImplementedError

    def closed(self, kind: str, content: Any) -> Iterator[bytes]:
        """The events that end a block with all of its content."""
        raise NotImplementedError

    def blocks(self, part: CompletionPart) -> list[Fields]:
        """The blocks of a whole answer."""
        for kind, content in contents(part):
            self.items.append(self.block(kind, content))
            self.index += 1
        return self.items

    def events(self, part: CompletionPart) -> Iterator[bytes]:
        for kind, content in contents(part):
            if kind == "call" or kind != self.kind:
                yield from self._close()
                self.kind, self.content = kind, ""
                yield from self.opened(kind, content)
            self.content = content if kind == "call" else self.content + content
            yield from self.added(kind, content)
        self.ended = part
        if part.end:
            yield from self._close()

    def _close(self) -> Iterator[bytes]:
        if self.kind:
            yield from self.closed(self.kind, self.content)
            self.kind, self.index = "", self.index + 1


def contents(part: CompletionPart) -> Iterator[tuple[str, Any]]:
    """The (kind, content) of the blocks in a part, in their order."""
    if part.thinking:
        yield "thinking", part.thinking
    if part.text:
        yield "text", part.text
    yield from (("call", call) for call in part.calls)


class CallStream:
    """An answer that may call tools as it comes, split into its words and its calls. The possible opening of a call is
    withheld, and white space at the ends of the words is dropped."""

    def __init__(self) -> None:
        self.text, self.released = "", 0

    def feed(self, text: str, whole: bool = False) -> tuple[str, list[ToolCall]]:
        """The new words that are certain; with `whole`, all that are left, and the calls."""
        self.text = self.text + text if self.released else (self.text + text).lstrip()
        if whole:
            words, calls = parse_calls(self.text)
            return words[self.released :], calls
        new = self.text[self.released : undecided(self.text, self.released)].rstrip()
        self.released += len(new)
        return new, []


def call_fields(calls: Sequence[ToolCall]) -> list[Fields]:
    functions = [{"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)} for call in calls]
    return [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": each} for each in functions]


def finish_reason(end: str) -> str | None:
    """OpenAI's word for an end; every one that is neither the document's nor a stop text is a limit."""
    return ("stop" if end in ("end", "stop") else "length") if end else None


def event(fields: Fields, name: str = "") -> bytes:
    """A server-sent event, perhaps with a name."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + line(fields) + b"\n"


def line(fields: Fields) -> bytes:
    return encoded(json.dumps(fields, ensure_ascii=False) + "\n")
