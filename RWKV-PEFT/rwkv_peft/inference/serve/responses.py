"""Completions in OpenAI's form: whole, or in chunks as they are sampled."""

import codecs
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...cli.errors import encoded
from ...data.tokenizer import Tokenizer
from ...data.tools import ToolCall, parse_calls, undecided
from ..requests import Logprobs
from ..thinking import ThinkingStream

Fields = dict[str, Any]
UTF_8 = codecs.getincrementaldecoder("utf-8")
REASONING = "reasoning_content"  # the field of a message or a delta that holds its thinking


class Token(NamedTuple):
    """A token of a completion; logprobs are None if not requested."""

    id: int
    logprobs: Logprobs | None


class CompletionPart(NamedTuple):
    """New text and tokens of the completion of this number; end is "" while it goes on, else the reason for its end."""

    number: int
    text: str
    tokens: tuple[Token, ...]
    end: str = ""


class Usage(NamedTuple):
    """Tokens of prompts, those of them found in the cache, and tokens of completions."""

    prompt: int
    cached: int
    completions: int

    def fields(self) -> Fields:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completions,
            "total_tokens": self.prompt + self.completions,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Response:
    """The envelope around completions; subclasses give the form of one."""

    prefix, whole_kind, chunk_kind = "", "", ""

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.head = {"id": f"{self.prefix}{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.tokenizer, self.logprobs = tokenizer, logprobs

    def choice(self, part: CompletionPart) -> Fields:
        """A whole completion."""
        raise NotImplementedError

    def delta(self, part: CompletionPart, first: bool) -> Fields | None:
        """A part of a completion, None for an empty one; first: no part of it was sent yet."""
        raise NotImplementedError

    def whole(self, completions: Sequence[CompletionPart], usage: Usage) -> Fields:
        choices = [self.choice(part) for part in completions]
        return {**self.head, "object": self.whole_kind, "choices": choices, "usage": usage.fields()}

    def chunk(self, choices: Sequence[Fields], usage: Usage | None = None) -> bytes:
        """A server-sent event."""
        fields = {**self.head, "object": self.chunk_kind, "choices": list(choices)}
        return event(fields | ({} if usage is None else {"usage": usage.fields()}))

    def is_empty(self, part: CompletionPart) -> bool:
        return not (part.text or part.end or (part.tokens and self.logprobs))

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
        self, model: str, tokenizer: Tokenizer, logprobs: bool, calls: bool, forced: bool = False, splits: bool = False
    ) -> None:
        super().__init__(model, tokenizer, logprobs)
        self.calls, self.forced, self.splits = calls, forced, splits
        self.streams: dict[int, CallStream] = defaultdict(CallStream)
        self.thinking: dict[int, ThinkingStream] = defaultdict(ThinkingStream)

    def choice(self, part: CompletionPart) -> Fields:
        thinking, text = ThinkingStream().feed(part.text, whole=True) if self.splits else ("", part.text)
        text, calls = parse_calls(text) if self.calls else (text, [])
        text = "" if self.forced and not calls else text
        message: Fields = {"role": "assistant", "content": text, "refusal": None}
        if thinking:
            message[REASONING] = thinking
        if calls:
            message |= {"content": text or None, "tool_calls": call_fields(calls)}
        return {"index": part.number, "message": message, **self._rest(part, bool(calls))}

    def delta(self, part: CompletionPart, first: bool) -> Fields | None:
        calls, thinking = list[ToolCall](), ""
        if self.splits:
            thinking, text = self.thinking[part.number].feed(part.text, bool(part.end))
            part = part._replace(text=text)
        if self.calls:
            stream = self.streams[part.number]
            part = part._replace(text=stream.feed(part.text))
            if part.end:
                rest, calls = stream.finish()
                part = part._replace(text="" if self.forced and not calls else part.text + rest)
        if self.is_empty(part) and not thinking:
            return None
        delta: Fields = {"role": "assistant"} if first else {}
        delta |= {REASONING: thinking} if thinking else {}
        delta |= {"content": part.text} if part.text or not thinking else {}
        if calls:
            delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(call_fields(calls))]
        return {"index": part.number, "delta": delta, **self._rest(part, bool(calls))}

    def _rest(self, part: CompletionPart, calls: bool) -> Fields:
        content = [self._logprobs(token) for token in part.tokens] if self.logprobs else []
        logprobs = {"content": content, "refusal": None} if self.logprobs else None
        end = finish_reason(part.end)
        return {"logprobs": logprobs, "finish_reason": "tool_calls" if calls and end == "stop" else end}

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


class CallStream:
    """The text of an answer that may call tools, as it comes; the possible opening of a call is withheld."""

    def __init__(self) -> None:
        self.text, self.released = "", 0

    def feed(self, text: str) -> str:
        """The text that is certain now."""
        self.text += text
        certain = undecided(self.text, self.released)
        new, self.released = self.text[self.released : certain], certain
        return new

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The text still withheld, and the calls."""
        words, calls = parse_calls(self.text)
        if not calls:
            return self.text[self.released :], []
        return words[len(self.text[: self.released].strip()) :], calls


def call_fields(calls: Sequence[ToolCall]) -> list[Fields]:
    functions = [{"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)} for call in calls]
    return [{"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": each} for each in functions]


def finish_reason(end: str) -> str | None:
    """OpenAI's word for an end; every one that is neither the document's nor a stop text is a limit."""
    return ("stop" if end in ("end", "stop") else "length") if end else None


def event(fields: Fields) -> bytes:
    return encoded(f"data: {json.dumps(fields, ensure_ascii=False)}\n\n")
