"""Lays out answers with thinking, as the RWKV-7 G1 models give them: <think>, the thinking, </think>, the answer.

A prompt that ends in "Assistant: <think" asks for thinking, and one that ends in "Assistant: <think></think", an empty
thinking, for an answer at once; the model goes on from there (RWKV-LM, RWKV-v7/RWKV7-G1x-templates.txt).
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..errors import UserError

# --think -> the text that a prompt adds to "Assistant:"
OPENINGS = MappingProxyType({"on": " <think", "off": " <think></think"})
FIELDS = ("reasoning_content", "reasoning", "thinking")  # of rows; they hold thinking unless the answer's words do
EMPTY = re.compile(r" ?<think(>\s*</think)?>?\s*$")


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
