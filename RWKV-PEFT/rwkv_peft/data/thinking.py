"""Answers with thinking, as the RWKV-7 G1 models give them: <think>, what they think, </think>, the answer.

A prompt asks for thinking with what opens it, "Assistant: <think", and for an answer at once with a thinking that is
empty, "Assistant: <think></think"; the model goes on from there (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt).
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import UserError

# what a prompt adds to "Assistant:", by what --think says
OPENINGS = MappingProxyType({"on": " <think", "off": " <think></think"})
FIELDS = ("reasoning_content", "reasoning", "thinking")  # where rows hold it, unless the answer's own words do
EMPTY = re.compile(r" ?<think(>\s*</think)?>?\s*$")


def without_opening(prompt: str) -> str:
    """A prompt without the opening of a thinking at its end: up to "Assistant:"."""
    return EMPTY.sub("", prompt)


def parted(words: str, row: Mapping[str, Any] | None = None) -> tuple[str | None, str]:
    """(thinking or None, answer) of an answer's words, or of its row's FIELDS; UserError for a <think> without an
    end."""
    words = words.strip()
    if words.startswith("<think>"):
        thinking, closing, answer = words.removeprefix("<think>").partition("</think>")
        if not closing:
            raise UserError("an answer opens <think> and has no </think>; close it, or leave the row out")
        return thinking, answer.strip()
    row = row or {}
    found = next((row[name] for name in FIELDS if isinstance(row.get(name), str)), None)
    return found and f"\n{found.strip()}\n", words


def answered(words: str, row: Mapping[str, Any], think: str) -> tuple[str, str]:
    """An answer -> (what opens it behind "Assistant:", what the model says from there on), as --think has it: "on" with
    the thinking that the row holds, as always if it holds none; "off" with an empty one; "" the words as they are."""
    if not think:
        return "", f" {words.strip()}"
    thinking, answer = parted(words, row)
    if think == "off":
        return OPENINGS["off"], f">\n{answer}"
    if not (thinking or "").strip():
        return "", f" {answer}"
    return OPENINGS["on"], f">{thinking}</think>\n{answer}"
