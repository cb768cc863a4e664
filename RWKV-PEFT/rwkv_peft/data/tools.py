"""Tools, calls of tools and their results in chats: rows' objects -> text, and the text of an answer -> its calls.

RWKV-7 G1 was trained on many forms of calls (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt), among them the data sets of
Glaive, xLAM and Hermes (RWKV-LM, #308). This is the form of Hermes, which RWKV runtimes write and parse, too
(RWKV-Vibe/rwkv_lightning, API_servers/openai_adapter.py), in the turns of RWKV's own chats: the system turn lists the
tools, as short as it can, an answer holds each call as JSON between <tool_call> and </tool_call>, and a turn of the
speaker Tool holds a result.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..cli.errors import UserError, quoted, short
from .fields import CALLS, LISTS, NOTHING

LISTING = "<tools>"
ASKED = 'To call one, answer <tool_call>{"name": …, "arguments": {…}}</tool_call>.'
THOUGHT = re.compile(r"\s*(?:<think>.*?(?:</think>|\Z)|>.*?</think>)|", re.DOTALL)  # with or without its prompt's part
OPENS = re.compile(r"<tool_call>\s*|\*\*Tool Call:\*\*\s*```(?:json)?\s*")  # the second as in RWKV-LM's templates
SPACE = re.compile(r"\s*")
CLOSINGS = ("</tool_call>", "```")
CLOSES = re.compile(rf"\s*(?:{'|'.join(CLOSINGS)})|")


class ToolCall(NamedTuple):
    """A call of the tool `name`."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return json.dumps(self._asdict(), ensure_ascii=False)


def tools_text(tools: object) -> str:
    """The part of a system turn that lists tools, "" for none. tools is a list, or its JSON as text, of functions
    {name, description, parameters}, each perhaps within {"type": "function", "function": …}."""
    found = parsed(tools, "the list of tools")
    if found in NOTHING:
        return ""
    functions = [each.get("function", each) if isinstance(each, dict) else each for each in as_list(found)]
    for function in functions:
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"a tool is {quoted(function)}; it needs a name, and mostly has parameters")
    lines = [json.dumps(function, ensure_ascii=False) for function in functions]
    return "\n".join([LISTING, *lines, "</tools>", ASKED])


def listed(holder: Mapping[str, Any]) -> str:
    """tools_text of a row or a turn that lists tools in one of LISTS."""
    return tools_text(next((holder[name] for name in LISTS if holder.get(name)), None))


def calls_text(calls: object) -> str:
    """The part of an answer that calls tools, "" for none. calls is a call, a list of calls, or the JSON of either as
    text; each is {name, arguments}, perhaps within {"type": "function", "function": …}."""
    found = parsed(calls, "a call of a tool")
    each_call = () if found in NOTHING else map(call_of, as_list(found))
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in each_call)


def called(turn: Mapping[str, Any]) -> str:
    """calls_text of a turn."""
    return "\n".join(filter(None, (calls_text(turn.get(name)) for name in CALLS)))


def call_of(value: object) -> ToolCall:
    """The ToolCall in a row's value. Raises UserError for any other value, and for arguments that are no object."""
    call = value.get("function", value) if isinstance(value, dict) else value
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise UserError(f"a call of a tool is {quoted(value)}; it needs a name and arguments")
    name = call["name"]
    arguments = parsed(call.get("arguments", call.get("parameters")), f"the arguments of the call of {short(name)}")
    if arguments in NOTHING:
        return ToolCall(name, {})
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of the call of {short(name)} are {quoted(arguments)}, and an object is due")
    return ToolCall(name, arguments)


def parsed(value: object, what: str) -> object:
    """The value itself, or the value of its JSON if it is a text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is a text that is not JSON ({error}): {short(value)}") from error


def as_list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else [value]


def ordered(turns: Sequence[Any]) -> list[Any]:
    """Turns, with results that name their call (tool_call_id) in the order of the calls."""
    keys, calls, calling = list[tuple[int, int]](), dict[str, int](), 0
    for place, turn in enumerate(turns):
        fields = turn if isinstance(turn, dict) else {}
        if isinstance(found := fields.get("tool_calls"), list) and found:
            calling = place
            calls = {str(each.get("id")): number for number, each in enumerate(found, 1) if isinstance(each, dict)}
        answers = calls.get(str(fields["tool_call_id"])) if fields.get("tool_call_id") is not None else None
        keys.append((place, 0) if answers is None else (calling, answers))
    return [turns[place] for place in sorted(range(len(turns)), key=keys.__getitem__)]


def parse_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Split the text of an answer, all behind "Assistant:" -> (its other words, its calls).

    A thinking is among the words, and calls nothing; neither does an opening without JSON of a call behind it."""
    place = end_of(THOUGHT, text, 0)
    kept, calls = [text[:place]], list[ToolCall]()
    decode = json.JSONDecoder().raw_decode
    while opening := OPENS.search(text, place):
        found, end = list[ToolCall](), opening.end()
        try:
            while text.startswith(("{", "["), end):
                value, end = decode(text, end)
                found += [call_of(each) for each in as_list(value)]
                end = end_of(SPACE, text, end)
        except (UserError, ValueError, RecursionError):  # JSON of something else, or no JSON
            found = []
        end = end_of(CLOSES, text, end) if found else opening.end()
        if found and any(closing.startswith(text[end:]) for closing in CLOSINGS):  # cut by a limit
            end = len(text)
        kept.append(text[place : opening.start() if found else end])
        calls += found
        place = end
    return "".join([*kept, text[place:]]).strip(), calls


def end_of(pattern: re.Pattern[str], text: str, place: int) -> int:
    """The place behind the match of a pattern, which may be empty, at `place`."""
    match = pattern.match(text, place)
    assert match is not None
    return match.end()
