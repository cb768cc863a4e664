"""OpenAI's /v1/responses over the one form of requests: its items become chat turns, and answers become its items.

Nothing is stored: a request holds its whole conversation.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .requests import checked, optional, wrong
from .responses import BlockResponse, CompletionPart, Fields, Usage, event, finish_reason
from .web import RequestError

PATH = "/v1/responses"
STORED = ("previous_response_id", "conversation", "prompt")
UNUSED = ("include", "truncation", "max_tool_calls", "client_metadata", "background")  # once they are found to be off


def chat_of(body: Mapping[str, Any]) -> Fields:
    """The fields of a ChatBody for a body of /v1/responses. Raises RequestError for items that are no text."""
    fields = dict(body)
    for name in STORED:
        if fields.pop(name, None):
            raise wrong(name, "nothing is stored here; leave it out, and send the whole conversation as input")
    if fields.get("background") or fields.pop("top_logprobs", None):
        raise wrong("background" if fields.get("background") else "top_logprobs", "it is not supported; leave it out")
    for name in UNUSED:
        fields.pop(name, None)
    given = fields.pop("input", None)
    items = [{"role": "user", "content": given}] if isinstance(given, str) else checked(given, list, "input")
    turns = [turn for number, item in enumerate(items) if (turn := turn_of(f"input.{number}", item))]
    if instructions := optional(fields.pop("instructions", None), str, "instructions"):
        turns.insert(0, {"role": "system", "content": instructions})
    if (most := fields.pop("max_output_tokens", None)) is not None:
        fields["max_tokens"] = most
    if tools := optional(fields.pop("tools", None), list, "tools"):
        fields["tools"] = [tool_of(f"tools.{number}", tool) for number, tool in enumerate(tools)]
    match fields.get("tool_choice"):
        case {"type": "function", "name": name}:
            fields["tool_choice"] = {"type": "function", "function": {"name": name}}
    text = optional(fields.pop("text", None), dict, "text") or {}
    if form := optional(text.get("format"), dict, "text.format"):
        nested = form.get("type") == "json_schema"
        fields["response_format"] = {"type": "json_schema", "json_schema": form} if nested else form
    return fields | {"messages": turns}


def turn_of(place: str, item: object) -> Fields | None:
    """The chat turn of an item, None for a thinking."""
    match checked(item, dict, place):
        case {"type": "function_call", "name": str(name)} as call:
            function = {"name": name, "arguments": call.get("arguments")}
            return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
        case {"type": "function_call_output"} as result:
            return {"role": "tool", "content": result.get("output") or ""}
        case {"type": "reasoning"}:
            return None
        case {"role": role, **rest} if rest.get("type", "message") == "message":
            return {"role": role, "content": rest.get("content")}
    raise wrong(place, "a message with role and content, a function_call or a function_call_output is due")


def tool_of(place: str, tool: object) -> Fields:
    match checked(tool, dict, place):
        case {"type": "function", **function}:
            function.pop("strict", None)  # no fact for the model
            return {"type": "function", "function": function}
    raise wrong(place, "tools that run on the server are not supported; leave it out")


class ItemResponse(BlockResponse):
    """An answer as a response with items."""

    prefix = "resp_"
    number = -1  # of the last event

    def block(self, kind: str, content: Any, status: str = "completed") -> Fields:
        name = self.name_of(kind)
        if kind == "thinking":
            texts = [{"type": "reasoning_text", "text": content}] if content else []
            return {"id": name, "type": "reasoning", "summary": [], "content": texts, "status": status}
        if kind == "text":
            parts = [self.part(content)] if content or status == "completed" else []
            return {"id": name, "type": "message", "role": "assistant", "content": parts, "status": status}
        arguments = json.dumps(content.arguments, ensure_ascii=False) if status == "completed" else ""
        call = {"call_id": f"call_{name[3:]}", "name": content.name, "arguments": arguments}
        return {"id": name, "type": "function_call", **call, "status": status}

    def name_of(self, kind: str) -> str:
        """The name of the item that is written now."""
        names = {"thinking": "rs_", "text": "msg_", "call": "fc_"}
        return f"{names[kind]}{str(self.head['id']).removeprefix(self.prefix)}{self.index:02}"

    def part(self, text: str) -> Fields:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def response(self, items: list[Fields], part: CompletionPart | None, usage: Usage | None) -> Fields:
        cut = part is not None and finish_reason(part.end) == "length"
        status = "in_progress" if part is None else "incomplete" if cut else "completed"
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "status": status,
            "model": self.head["model"],
            "output": items,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": None,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
            "truncation": "disabled",
            "usage": usage
            and {
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completions,
                "output_tokens_details": {"reasoning_tokens": usage.thinking},
                "total_tokens": usage.prompt + usage.completions,
            },
            **self.notes,
        }

    def whole(self, completions: Sequence[CompletionPart], usage: Usage) -> Fields:
        (part,) = completions
        return self.response(self.blocks(part), part, usage)

    def begin(self, usage: Usage) -> Iterator[bytes]:
        yield self.sent("response.created", response=self.response([], None, None))
        yield self.sent("response.in_progress", response=self.response([], None, None))

    def opened(self, kind: str, content: Any) -> Iterator[bytes]:
        item = self.block(kind, content if kind == "call" else "", "in_progress")
        yield self.sent("response.output_item.added", output_index=self.index, item=item)
        if kind == "text":
            yield self.sent("response.content_part.added", **self.place(kind), part=self.part(""))

    def added(self, kind: str, content: Any) -> Iterator[bytes]:
        if kind == "call":
            arguments = json.dumps(content.arguments, ensure_ascii=False)
            yield self.sent("response.function_call_arguments.delta", **self.place(kind), delta=arguments)
        else:
            more: Fields = {"logprobs": []} if kind == "text" else {}
            yield self.sent(f"response.{self.event_of(kind)}.delta", **self.place(kind), delta=content, **more)

    def closed(self, kind: str, content: Any) -> Iterator[bytes]:
        if kind == "call":
            arguments = json.dumps(content.arguments, ensure_ascii=False)
            done = {"name": content.name, "arguments": arguments}
            yield self.sent("response.function_call_arguments.done", **self.place(kind), **done)
        else:
            more: Fields = {"logprobs": []} if kind == "text" else {}
            yield self.sent(f"response.{self.event_of(kind)}.done", **self.place(kind), text=content, **more)
        if kind == "text":
            yield self.sent("response.content_part.done", **self.place(kind), part=self.part(content))
        self.items.append(self.block(kind, content))
        yield self.sent("response.output_item.done", output_index=self.index, item=self.items[-1])

    def event_of(self, kind: str) -> str:
        return "output_text" if kind == "text" else "reasoning_text"

    def place(self, kind: str) -> Fields:
        place: Fields = {"item_id": self.name_of(kind), "output_index": self.index}
        return place if kind == "call" else place | {"content_index": 0}

    def ending(self, usage: Usage) -> Iterator[bytes]:
        response = self.response(self.items, self.ended, usage)
        yield self.sent(f"response.{response['status']}", response=response)

    def failure(self, error: RequestError) -> bytes:
        return self.sent("error", code=error.code, message=error.message, param=error.param)

    def sent(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number, **fields}, kind)
