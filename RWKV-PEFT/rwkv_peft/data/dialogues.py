"""Turns that are written out in one text, by speakers' names or in the templates of other models -> turns of a chat."""

import re
from types import MappingProxyType

ROLES = MappingProxyType(  # the name or mark that opens a turn, in lower case -> the role
    dict.fromkeys(("system", "<<sys>>"), "system")
    | dict.fromkeys(
        ("human", "user", "question", "instruction", "input", "用户", "人类", "问", "[inst]", "<</sys>>"), "user"
    )
    | dict.fromkeys(("assistant", "answer", "response", "gpt", "bot", "model", "助手", "答", "[/inst]"), "assistant")
)
NAMES = "|".join(role for role in ROLES if role.isalpha())
CLOSES = re.compile(r"<\|(?:im_end|eot_id|end|endoftext|begin_of_text|end_of_text)\|>|<end_of_turn>|<bos>|<eos>|</?s>")
MARKED = tuple(  # what opens a turn in templates with marks of their own
    re.compile(opens, re.IGNORECASE)
    for opens in (
        r"<\|im_start\|>(\w+)\n",
        r"<\|start_header_id\|>(\w+)<\|end_header_id\|>",
        r"<start_of_turn>(\w+)\n",
        r"<\|(system|user|assistant)\|>",
        r"(<</?SYS>>|\[/?INST\])",
        rf"### ?({NAMES}) ?:",
    )
)
NAMED = tuple(  # a name begins a turn behind a blank line, or else on any line
    re.compile(rf"(?:\A|{gap})\s*({NAMES}) ?[:：]", re.IGNORECASE) for gap in (r"\n\s*\n", r"\n")
)
# a text with turns begins with a name, or has one of these marks
BEGINS = re.compile(rf"\s*(?:{NAMES}) ?[:：]", re.IGNORECASE)
MARKS = ("<|", "### ", "[/INST]", "<start_of_turn>")


def written_turns(text: str) -> list[dict[str, str]]:
    """The turns {role, content} of a text of two speakers; [] for any other. The last may be empty, the opening of an
    answer. Words before a template's first mark are the system's."""
    if not BEGINS.match(text) and not any(map(text.__contains__, MARKS)):
        return []
    for opens in (*MARKED, *NAMED):
        front, *rest = opens.split(text)
        words = [CLOSES.sub("", part).strip() for part in (front, *rest[1::2])]
        roles = ["system", *(ROLES.get(role.lower(), "") for role in rest[::2])]
        if "" in roles or not {"user", "assistant"} <= {*roles} or (words[0] and opens in NAMED):
            continue
        turns = list[dict[str, str]]()
        for place, (role, said) in enumerate(zip(roles, words)):
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += f"\n{said}"
            elif said or place == len(words) - 1:
                turns.append({"role": role, "content": said})
        return turns
    return []
