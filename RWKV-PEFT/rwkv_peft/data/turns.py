"""Lays out the turns of a chat as the text of a document, and says which parts of it count in the loss: a row's field
"weight", and a turn's SWITCHES, tell it, too.

Answers with thinking are laid out as the RWKV-7 G1 models give them: <think>, the thinking, </think>, the answer. A
prompt that ends in "Assistant: <think" asks for thinking, and one that ends in "Assistant: <think></think", an empty
thinking, for an answer at once; the model goes on from there (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt).

A turn begins behind TURN_END with a speaker's name. The words of a system, a user or a tool hold no TURN_END (cleaned),
as in G1's training, so that no text of theirs is read as a turn of somebody else.
"""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..cli.errors import UserError, field_names, quoted, short
from .fields import Fields
from .tools import LISTS, NOTHING, TURN_CALLS, called, calls_text, listed, ordered

# --think -> the text that a prompt adds to "Assistant:"
OPENINGS = MappingProxyType({"on": " <think", "off": " <think></think"})
FIELDS = ("reasoning_content", "reasoning", "thinking")  # of rows; they hold thinking unless the answer's words do
EMPTY = re.compile(r" ?<think(>\s*</think)?>?\s*$")
Segment = tuple[str, bool]  # a text, and whether it counts in the loss
TURN_END = "\n\n"  # token 261 of the World vocabulary
UNPLACED = frozenset((*LISTS, *TURN_CALLS, "history"))  # fields of a row that may not be lost
MEDIA = frozenset(("image", "images", "video", "videos", "audio", "audios"))  # fields of a row, or of a turn
CALLS = ("function_call", "tool_call")  # roles of turns that only call tools, in ShareGPT's form
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
        "tool_response": "Tool",
        **dict.fromkeys(CALLS, "Assistant"),
    }
)
TEXT_PARTS = ("text", "input_text", "output_text")  # the types of the parts of a content that are texts
WEIGHT, TRAIN = "weight", "train"
SWITCHES = (WEIGHT, TRAIN, "training", "loss")  # fields of a turn that say whether it counts, in one tool or another
PARTLY = ("train_detail", "mask", "masked")  # those that say it in a way that is not followed
OF_TOKENS = ("preprocess", "train")  # the commands of encoding.REMEDIES whose rows may weigh


def without_opening(prompt: str) -> str:
    """A prompt without the opening of a thinking at its end: up to "Assistant:"."""
    return EMPTY.sub("", prompt)


def parted(words: str, row: Mapping[str, Any]) -> tuple[str | None, str]:
    """Split an answer's words into (thinking or None, answer); without <think> the thinking is in one of its row's
    FIELDS. Raises UserError for a <think> without an end."""
    words = words.strip()
    if words.startswith("<think>"):
        thinking, closing, answer = words.removeprefix("<think>").partition("</think>")
        if not closing:
            raise UserError("an answer opens <think> and has no </think>; close it, or leave the row out")
        return thinking, answer.strip()
    found = next((row[name] for name in FIELDS if isinstance(row.get(name), str)), None)
    return found and f"\n{found.strip()}\n", words


def answered(words: str, row: Mapping[str, Any], think: str) -> tuple[str, str]:
    """Split an answer -> (its opening behind "Assistant:", the text that the model continues with), by think: "on" with
    the thinking that the row holds, and without any opening if it holds none; "off" with an empty thinking; "" with the
    words as they are."""
    if not think:
        return "", f" {words.strip()}"
    thinking, answer = parted(words, row)
    if think == "off":
        return OPENINGS["off"], f">\n{answer}"
    if not (thinking or "").strip():
        return "", f" {answer}"
    return OPENINGS["on"], f">{thinking}</think>\n{answer}"


def cleaned(words: str, clean: bool = True) -> str:
    """Words of anybody but the assistant without blank lines and without space at their ends; as they are if `clean` is
    false."""
    return re.sub(r"\n{2,}", "\n", words.replace("\r\n", "\n")).strip() if clean else words


def chat(messages: object, think: str = "", clean: bool = True) -> list[Segment]:
    """Lay out turns {role, content} or {from, value}: the assistant's words count, unless the turn says otherwise
    (is_learned), the others' do not; think and clean are as in templates.segments.

    The blank line behind an assistant's turn and the next speaker's name count, too: both together say that the model
    is done, because a blank line alone may only separate two paragraphs (stops_of). They are segments of their own, so
    that the blank line is the token that runtimes know, whatever the words end in.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError("messages must be a list of turns, each with role and content (or from and value)")
    parts: list[Segment] = []
    before = ""  # the speaker of the turn before
    for turn in ordered(messages):
        if not isinstance(turn, dict):
            raise UserError(f"a turn is {type(turn).__name__}, not an object with role and content")
        role, words = said(turn, clean)
        learned_before = bool(parts) and parts[-1][1]
        if before == role == "Assistant" and only_calls(turn):
            parts[-1] = (f"{parts[-1][0]}\n{words}", learned_before)
            continue
        if before == "Assistant":
            parts.append((TURN_END, learned_before))
        elif parts:
            parts[-1] = (parts[-1][0] + TURN_END, False)
        if role == "Assistant":
            opening, rest = answered(words, turn, think)
            parts += [(f"{role}:{opening}", False), (rest, is_learned(turn))]
        else:
            parts += [(f"{role}:", learned_before), (f" {words}", False)]
        before = role
    return parts


def said(turn: Mapping[str, Any], clean: bool = True) -> tuple[str, str]:
    """The speaker of a turn and its words, with the calls of the assistant's and the tools of the system's."""
    role_name, words_name = ("role", "content") if "role" in turn else ("from", "value")
    role = speaker(field(turn, role_name)) if role_name in turn else ""
    refuse_media(turn)
    calls, tools = called(turn), listed(turn)
    if not role or (words_name not in turn and not calls):
        raise UserError(f"a turn has the fields {field_names(turn)}; it needs role and content, or from and value")
    for more, speaks, what in ((calls, "Assistant", "calls a tool"), (tools, "System", "lists tools")):
        if more and role != speaks:
            raise UserError(f"a turn of role {turn[role_name]!r} {what}, which only the {speaks.lower()} does")
    if only_calls(turn):
        return role, calls or calls_text(turn[words_name])
    words = "" if calls and turn.get(words_name) is None else words_of(turn, words_name).strip()
    words = words if role == "Assistant" else cleaned(words, clean)
    return role, "\n".join(filter(None, (words, calls, tools)))


def only_calls(turn: Mapping[str, Any]) -> bool:
    """Tell whether a turn's role is one of CALLS: its words are the calls, and it continues the answer before it."""
    return str(turn.get("role", turn.get("from"))).lower() in CALLS


def speaker(role: str) -> str:
    """The name that RWKV World chats give to a role."""
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


def refuse_unplaced(row: Fields) -> None:
    """Raise UserError if a row holds one of UNPLACED, or something that is no text, and its layout has not read it."""
    refuse_media(row)
    for name, value in row.items():
        if name in UNPLACED and name not in row.read and value not in NOTHING:
            remedy = "earlier turns belong into messages" if name == "history" else "write it out in the turns' words"
            raise UserError(
                f"field {name!r} has no place in this layout; {remedy}, or remove the field if it should not be learned"
            )


def refuse_media(holder: Mapping[str, Any]) -> None:
    """Raise UserError if a row or a turn holds one of MEDIA."""
    for name, value in holder.items():
        if name in MEDIA and value not in NOTHING:
            raise UserError(
                f"field {name!r} is no text, and only text is read; leave such rows out, or remove the field if their "
                "words do without it"
            )


def field(row: Mapping[str, Any], name: str) -> str:
    """The text row[name]; a number is its digits. Raises UserError for anything else."""
    value = row[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"field {name!r} holds {type(value).__name__}, not text")
    return value


def weight_of(row: object, command: str) -> float:
    """Return the weight of a row: its WEIGHT, or 1. Raises UserError for anything but a number from 0 on, and if
    the loss of the command's rows has no weights."""
    found = row.get(WEIGHT) if isinstance(row, dict) else None
    if found is None or found == "":
        return 1.0
    try:
        weight = float(found)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    said, rename = f"field {WEIGHT!r} holds {quoted(found)}", "rename the field if it means something else"
    if isinstance(found, bool) or not 0 <= weight < math.inf:
        raise UserError(f"{said}; a row's weight in the loss is a number from 0 on; {rename}")
    if weight != 1 and command not in OF_TOKENS:
        raise UserError(f"{said}, and only rows of --data_type sft weigh in the loss; leave it out, or {rename}")
    return weight


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Return whether an answer counts: not if one of its SWITCHES is 0 or false. Raises UserError for other values,
    because only whole rows have other weights, and for a turn that holds one of PARTLY."""
    for name in PARTLY:
        if turn.get(name) not in (*NOTHING, False):
            raise UserError(
                f"field {name!r} of a turn is not followed; a turn counts as a whole, or with {TRAIN!r} false not at "
                "all, and rows of segments may count in parts"
            )
    for name in SWITCHES:
        found = turn.get(name)
        if found not in (None, 0, 1):
            raise UserError(
                f"field {name!r} of a turn holds {quoted(found)}; 0 leaves its words out of the loss, and 1 does "
                "not; any other weight is for the whole row, beside its turns"
            )
        if found is not None and not found:
            return False
    return True
