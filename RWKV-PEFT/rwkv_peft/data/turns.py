"""Lays out the turns of a chat as the text of a document, and says which parts of it count in the loss."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import UserError, short
from .thinking import answered

Segment = tuple[str, bool]  # a text, and whether it counts in the loss
TURN_END = "\n\n"  # token 261 of the World vocabulary

# fields of a row or a turn for which the layouts have no place
UNPLACED = ("tools", "tool_calls", "functions", "function_call", "history")
CALL = "function_call"  # ShareGPT's role of a turn that calls a tool
SPEAKERS = MappingProxyType(  # the role of a turn -> the name that RWKV World chats give to it
    {
        "user": "User",
        "human": "User",
        "assistant": "Assistant",
        "gpt": "Assistant",
        "model": "Assistant",
        "bot": "Assistant",
        "system": "System",
        "developer": "System",
        "tool": "Tool",
        "function": "Tool",
        "observation": "Tool",
    }
)
TEXT_PARTS = ("text", "input_text", "output_text")  # the types of the parts of a content that are texts


def chat(messages: object, think: str = "") -> list[Segment]:
    """Lay out turns {role, content} or {from, value}: the assistant's words count, the others' do not; think is as in
    templates.segments.

    The blank line behind an assistant's turn and the next speaker's name count, too: both together say that the model
    is done, because a blank line alone may only separate two paragraphs (stops_of). They are segments of their own, so
    that the blank line is the token that runtimes know, whatever the words end in.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of turns, each with role and content (or from and value)")
    parts: list[Segment] = []
    for turn in messages:
        if not isinstance(turn, dict):
            raise UserError(f"a turn is {type(turn).__name__}, not an object with role and content")
        role_name, words_name = ("role", "content") if "role" in turn else ("from", "value")
        role = speaker(field(turn, role_name)) if role_name in turn else ""
        refuse_unplaced(turn)  # before its words, which a turn that calls a tool may lack
        if not role or words_name not in turn:
            raise UserError(
                f"a turn has the fields {', '.join(map(str, turn))}; it needs role and content, or from and value"
            )
        words = words_of(turn, words_name).strip()
        answered_before = bool(parts) and parts[-1][1]
        if answered_before:
            parts.append((TURN_END, True))
        elif parts:
            parts[-1] = (parts[-1][0] + TURN_END, False)
        if role == "Assistant":
            opening, rest = answered(words, turn, think)
            parts += [(f"{role}:{opening}", False), (rest, True)]
        else:
            parts += [(f"{role}:", answered_before), (f" {words}", False)]
    return parts


def speaker(role: str) -> str:
    """The name that RWKV World chats give to a role."""
    if role.lower() == CALL:
        raise UserError(
            f"a turn of role {role!r} calls a tool, and no layout has a place for calls; write it out as a turn of the "
            "assistant's, or leave such rows out"
        )
    if role.lower() not in SPEAKERS:
        raise UserError(f"role {short(role)!r}; known are {', '.join(SPEAKERS)}")
    return SPEAKERS[role.lower()]


def words_of(turn: Mapping[str, Any], name: str) -> str:
    """The words of a turn in its field `name`: a text, or a list of parts whose texts are joined."""
    content = turn[name]
    if content is None:
        raise UserError(f"field {name!r} of a turn is null; give it the turn's words, or leave the turn out")
    return "".join(map(part_text, content)) if isinstance(content, list) else field(turn, name)


def part_text(part: object) -> str:
    """The text of one part of a turn's content. Raises UserError for a part that is no text, such as an image."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UserError(f"a part of a turn's content is {type(part).__name__}, not a text or an object with a type")
    kind = part.get("type", TEXT_PARTS[0])
    if kind not in TEXT_PARTS or "text" not in part:
        raise UserError(
            f"a part of a turn's content has the type {short(str(kind))!r}, and an RWKV model reads only texts "
            '({"type": "text", "text": …}); leave such rows out, or write that part out as text'
        )
    return field(part, "text")


def refuse_unplaced(holder: Mapping[str, Any]) -> None:
    """Raise UserError if a row or a turn holds one of UNPLACED, which would be lost."""
    for name in UNPLACED:
        if holder.get(name) not in (None, "", [], {}, "[]", "{}", "null"):
            remedy = "earlier turns belong into messages" if name == "history" else "write it out in the turns' words"
            raise UserError(
                f"field {name!r} has no place in any layout; {remedy}, or remove the field if it should not be learned"
            )


def field(row: Mapping[str, Any], name: str) -> str:
    """The text row[name]. Raises UserError if it is no text."""
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"field {name!r} holds {type(value).__name__}, not text")
    return value
