"""A World vocabulary as a tokenizer.json, so that whatever builds on the tokenizers library cuts text into its tokens.

World takes the longest token that begins at a place, which no order of merges does. A regular expression does: the tree
of the tokens' bytes, whose branches begin with different bytes and whose ends are optional, so that the last token
which ended on the way remains where no branch goes on. It cuts the text; the model is then a table of whole words.
"""

import json
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import Any

END = "<|rwkv_tokenizer_end_of_text|>"  # the text of token 0, which ends a document, as published folders spell it
MARKS = MappingProxyType(dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END))
VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
UNSEEN = tuple(byte for byte in range(256) if byte not in VISIBLE)
# the character that stands for each byte in the library's ByteLevel
CHARACTERS = "".join(chr(byte if byte in VISIBLE else 256 + UNSEEN.index(byte)) for byte in range(256))
Tree = dict[str, Any]  # {character: the tree behind it, "": whether a token ends here}


def world_json(table: Sequence[bytes | None], size: int) -> bytes:
    """Make the tokenizer.json of the first `size` entries of a table {id: bytes} (None: an id without a token)."""
    words: dict[str, int] = {END: 0}
    for number in range(1, size):
        content = table[number] if number < len(table) else None
        words[f"[PAD{number}]" if content is None else "".join(CHARACTERS[byte] for byte in content)] = number
    tokens = [word for word, number in words.items() if number < len(table) and table[number]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut = {"type": "Split", "pattern": {"Regex": longest(tokens)}, "behavior": "Isolated", "invert": False}
    end = {"id": 0, "content": END, "special": True}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [end | plain],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level, cut]},
            "decoder": byte_level,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": ""},  # what has no token is an error
        },
        ensure_ascii=False,
    ).encode()


def longest(words: Iterable[str]) -> str:
    """Write a regular expression that matches the longest of the words which begins at a place."""
    root: Tree = {}
    for word in words:
        tree = root
        for character in word:
            tree = tree.setdefault(character, {})
        tree[""] = True
    return _expression(root)


def _expression(tree: Tree) -> str:
    """The expression of what may follow in a tree; large branches come first, since they are the likely ones."""
    behind = {character: _expression(below) for character, below in tree.items() if character}
    last = "".join(_literal(character) for character, more in behind.items() if not more)
    branches = sorted((_literal(character) + more for character, more in behind.items() if more), key=len, reverse=True)
    either = "|".join([*([f"[{last}]"] if last else []), *branches])
    return f"(?:{either})" + "?" * ("" in tree) if either else ""


def _literal(character: str) -> str:
    return "\\" + character if character in r"^$\.*+?()[]{}|/-" else character
