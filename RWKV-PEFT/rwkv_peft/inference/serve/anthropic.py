"""Anthropic's /v1/messages over the one form of requests: blocks become chat turns, and answers become its events."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ...cli.errors import quoted
from .requests import checked, optional, wrong
from .responses import BlockResponse, CompletionPart, Fields, Usage, event, finish_reason
from .web import RequestError

PATH = "/v1/messages"
KINDS = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
    }
)
HEADERS = ("x-api-key", "anthropic-version", "anthropic-beta", "anthropic-dangerous-direct-browser-access")
CHOICES = MappingProxyType({"auto": "auto", "any": "required", "none": "none"})
CLEARED = "clear_thinking"  # begins the type of an edit of earlier thinkings, which prompts here leave out anyway


def error_fields(error: RequestError) -> Fields:
    kind = KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def chat_of(body: Mapping[str, Any]) -> Fields:
    """The fields of a ChatBody for a body of /v1/messages. Raises RequestError for blocks that are no text."""
    fields = dict(body)
    messages = checked(fields.pop("messages", None), list, "messages")
    turns = [turn for number, message in enumerate(messages) for turn in turns_of(f"messages.{number}", message)]
    if system := fields.pop("system", None):
        turns.insert(0, {"role": "system", "content": system})
    if stops := fields.pop("stop_sequences", None):
        fields["stop"] = stops
    if tools := optional(fields.pop("tools", None), list, "tools"):
        fields["tools"] = [tool_of(f"tools.{number}", tool) for number, tool in enumerate(tools)]
    if (choice := optional(fields.pop("tool_choice", None), dict, "tool_choice")) is not None:
        fields["tool_choice"] = choice_of(choice)
    if (output := optional(fields.pop("output_config", None), dict, "output_config")) is not None:
        if effort := output.get("effort"):
            fields["reasoning_effort"] = effort
        if form := optional(output.get("format"), dict, "output_config.format"):
            fields["response_format"] = {"type": form.get("type"), "json_schema": {"schema": form.get("schema")}}
    context = optional(fields.pop("context_management", None), dict, "context_management") or {}
    edits = optional(context.get("edits"), list, "context_management.edits") or []
    if not all(isinstance(edit, dict) and str(edit.get("type")).startswith(CLEARED) for edit in edits):
        raise wrong("context_management", "prompts are not edited here, but for the thinking in them; leave it out")
    return fields | {"messages": turns}


def turns_of(place: str, message: object) -> list[Fields]:
    """The turns of a message: the results of tools in it, and its words with its calls."""
    turn = checked(message, dict, place)
    content = turn.get("content")
    if not isinstance(content, list):
        return [{"role": turn.get("role"), "content": content}]
    words, calls, results = list[Fields](), list[Fields](), list[Fields]()
    for number, block in enumerate(content):
        where = f"{place}.content.{number}"
        match checked(block, dict, where):
            case {"type": "text"} as text:
                words.append(text)
            case {"type": "thinking" | "redacted_thinking"}:
                continue
            case {"type": "tool_use", "name": str(name), "input": dict(arguments)}:
                calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
            case {"type": "tool_result"} as result:
                results.append({"role": "tool", "content": result.get("content") or ""})
            case {"type": kind}:
                raise wrong(where, f"a block of the type {quoted(kind)}; texts, calls and results are read here")

            case _:
                raise wrong(where, "a block has a type, such as text")
    own: Fields = {"role": turn.get("role"), "content": words}
    return [*results, *([own | ({"tool_calls": calls} if calls else {})] if words or calls or not results else [])]


def tool_of(place: str, tool: object) -> Fields:
    given = checked(tool, dict, place)
    if given.get("type") not in (None, "custom"):
        raise wrong(place, "tools that run on the server are not supported; leave it out")
    function = {"name": given.get("name"), "description": given.get("description")}
    function = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": function | {"parameters": given.get("input_schema") or {}}}


def choice_of(choice: Mapping[str, Any]) -> object:
    match choice:
        case {"type": "tool", "name": name}:
            return {"type": "function", "function": {"name": name}}
        case {"type": str(kind)} if kind in CHOICES:
            return CHOICES[kind]
    raise wrong("tool_choice", '{"type": "auto"}, any, none or {"type": "tool", "name": …} is due')


class MessageResponse(BlockResponse):
    """An answer as a message with blocks."""

    prefix = "msg_"

    def block(self, kind: str, content: Any) -> Fields:
        if kind == "thinking":
            return {"type": "thinking", "thinking": content, "signature": ""}
        if kind == "text":
            return {"type": "text", "text": content}
        name = f"toolu_{secrets.token_hex(12)}"
        return {"type": "tool_use", "id": name, "name": content.name, "input": content.arguments}

    def message(self, blocks: list[Fields], part: CompletionPart | None, usage: Usage) -> Fields:
        head = {"id": self.head["id"], "type": "message", "role": "assistant", "model": self.head["model"]}
        tokens = self.usage_fields(usage)
        return head | {"content": blocks, **self.stopped(part), "usage": tokens} | self.notes

    def stopped(self, part: CompletionPart | None) -> Fields:
        if part is None:
            return {"stop_reason": None, "stop_sequence": None}
        if part.calls:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if part.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": part.stop}
        reason = {"stop": "end_turn", "length": "max_tokens"}[finish_reason(part.end) or "stop"]
        return {"stop_reason": reason, "stop_sequence": None}

    def usage_fields(self, usage: Usage) -> Fields:
        cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.cached}
        return {"input_tokens": usage.prompt - usage.cached, **cached, "output_tokens": usage.completions}

    def whole(self, completions: Sequence[CompletionPart], usage: Usage) -> Fields:
        (part,) = completions
        return self.message(self.blocks(part), part, usage)

    def begin(self, usage: Usage) -> Iterator[bytes]:
        yield self.sent("message_start", message=self.message([], None, usage._replace(completions=0)))

    def opened(self, kind: str, content: Any) -> Iterator[bytes]:
        empty = {**self.block(kind, content), "input": {}} if kind == "call" else self.block(kind, "")
        yield self.sent("content_block_start", index=self.index, content_block=empty)

    def added(self, kind: str, content: Any) -> Iterator[bytes]:
        delta = {
            "thinking": lambda: {"type": "thinking_delta", "thinking": content},
            "text": lambda: {"type": "text_delta", "text": content},
            "call": lambda: {"type": "input_json_delta", "partial_json": json.dumps(content.arguments)},
        }[kind]()
        yield self.sent("content_block_delta", index=self.index, delta=delta)

    def closed(self, kind: str, content: Any) -> Iterator[bytes]:
        yield self.sent("content_block_stop", index=self.index)

    def ending(self, usage: Usage) -> Iterator[bytes]:
        yield self.sent("message_delta", delta=self.stopped(self.ended), usage=self.usage_fields(usage), **self.notes)
        yield self.sent("message_stop")

    def failure(self, error: RequestError) -> bytes:
        return event(error_fields(error), "error")

    def sent(self, kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)
