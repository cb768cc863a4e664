"""Lays out a row of a prompt and two answers, a better and a worse one, as the texts of two documents."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from ..errors import UserError
from .templates import UnknownForm, behind_system, named_segments, segments
from .turns import Segment, chat, field, speaker

SIDES = ("chosen", "rejected")
PROMPTS = MappingProxyType({"query": "response", "question": "answer", "instruction": "output", "prompt": "completion"})
TURNS = ("messages", "conversations", "prompt")  # fields that may hold the turns before the answers
FORMS = (
    "chosen and rejected, each a text or turns (role and content), behind a prompt, query, question or instruction "
    "(and input), or behind messages; or two dialogues"
)
SPEAKER = re.compile(r"(?:^|\n\n)(System|Human|User|Assistant):")  # of dialogues that are texts, as in Anthropic's HH


def pair(row: object, names: Sequence[str] = (), think: str = "") -> list[list[Segment]]:
    """Lay out a row (dict) as the segments of its better and of its worse answer, each with the prompt before it. names
    are the fields of prompt, better and worse answer, if they are given; think is as in `segments`."""
    if not isinstance(row, dict):
        raise UserError(f"a row is {type(row).__name__}, not an object with fields: {FORMS}")
    if names:
        return [named_segments(row, (names[0], name), think) for name in names[1:]]
    if not all(side in row for side in SIDES):
        raise UnknownForm(
            f"a row has the fields {', '.join(map(str, row)) or '(none)'}; pairs are {FORMS}; rows of one answer are "
            "for --data_type sft"
        )
    for side in SIDES:
        if not isinstance(row[side], str | list | dict):
            field(row, side)
    before = next((row[name] for name in TURNS if isinstance(row.get(name), list)), None)
    if before is not None or not all(isinstance(row[side], str) for side in SIDES):
        better, worse = (turns(row, before, row[side]) for side in SIDES)
    elif prompt := next((name for name in PROMPTS if name in row), None):
        rest = {name: value for name, value in row.items() if name not in (*SIDES, "text")}
        return [segments(rest | {PROMPTS[prompt]: row[side]}, think) for side in SIDES]
    else:
        better, worse = (dialogue(row[side]) for side in SIDES)
        if not better or not worse:
            raise UnknownForm(f"a row has no prompt, only {', '.join(map(str, row))}; pairs are {FORMS}")
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(better, worse)))
    shared -= better == worse  # pairs of equal answers are counted as such
    return [behind_system(row, behind(one, shared, think)) for one in (better, worse)]


def turns(row: Mapping[str, Any], before: list[Any] | None, answer: object) -> list[Any]:
    """The turns of a conversation that ends in `answer`: a text, a turn, or a list of turns, which is the whole
    conversation if its first turn is not the assistant's."""
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    after = answer if isinstance(answer, list) else [answer]
    if after and not answers(after[0]):
        return after
    if before and answers(before[-1]):
        raise UserError("the turns before the answers end in one of the assistant's; leave it out")
    if before is None and isinstance(row.get("prompt"), str):
        before = [{"role": "user", "content": row["prompt"]}]
    return [*(before or []), *after]


def answers(turn: object) -> bool:
    """Return whether a turn is the assistant's or has no role. Raises UserError for an unknown role."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return not isinstance(role, str) or speaker(role) == "Assistant"


def dialogue(text: str) -> list[Any]:
    """The turns of a text in which each turn begins with its speaker's name; [] for any other text."""
    front, *rest = SPEAKER.split(text)
    turns = [{"role": role, "content": words} for role, words in zip(rest[::2], rest[1::2])]
    return [] if front.strip() else turns


def behind(conversation: list[Any], known: int, think: str) -> list[Segment]:
    """Lay out a conversation as segments; its first `known` turns do not count."""
    before = len(chat(conversation[:known])) if known else 0
    return [(text, counts and place >= before) for place, (text, counts) in enumerate(chat(conversation, think))]
