"""Lays out the rows of preferences, labels, prompts and contexts as the texts of documents.

`names`, if given, are the fields that hold the parts of a layout; `think` and `clean` are as in templates.segments.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from ..cli.errors import UserError, quoted
from .fields import Fields, UnknownForm, fields_of, require_field, shown, unknown
from .templates import CHATS, behind_system, named_segments, segments, turns_of
from .turns import TURN_END, Segment, chat, field, speaker

OPENAI = ("preferred_output", "non_preferred_output")  # beside an input, which holds messages and tools
SIDES = (("chosen", "rejected"), OPENAI, ("chosen_messages", "rejected_messages"))  # the better and the worse answer
CONTEXT, LABEL, COMPLETION, ANSWER = "context", "label", "completion", "answer"
PROMPTS = MappingProxyType({"query": "response", "question": "answer", "instruction": "output", "prompt": "completion"})
TURNS = (*CHATS, "conversation", "prompt")  # fields that may hold the turns before the answers
SPEAKER = re.compile(r"(?:^|\n\n)(System|Human|User|Assistant):")  # of dialogues that are texts, as in Anthropic's HH
UNDESIRABLE = 2  # in a .mask: the token counts, in an answer that is labelled undesirable
# think -> an answer to lay out, in the place of the one that the model will give
STAND_IN = MappingProxyType({"": ".", "off": ".", "on": "<think>.</think>."})
PAIRS = (
    "chosen and rejected, each a text or turns (role and content), behind a prompt, query, question or instruction "
    "(and input), or behind messages; chosen_messages and rejected_messages; input, preferred_output and "
    "non_preferred_output, as OpenAI has them; or two dialogues"
)
LABELS = (
    "label (true or false) beside a prompt and its completion, a query and response, a question and answer, an "
    "instruction and output; beside messages that end in the answer; or beside messages, or a list as prompt, and a "
    "completion behind them"
)
ASKED = (
    "a prompt, query, question or instruction (and input), or messages; an answer beside them is not read, but by what "
    "judges the model's"
)
CONTEXTS = (
    "context beside a question and answer, a query and response, an instruction and output, a prompt and completion, "
    "or messages"
)


def turns_before(row: Fields) -> list[Any] | None:
    """The turns that a row holds as a list, None if it has none."""
    name = next((name for name in TURNS if isinstance(row.peek(name), list)), "")
    found = turns_of(row, name) if name else None
    return found if isinstance(found, list) else None


def sides_of(row: Fields) -> tuple[str, str] | None:
    """The fields of a row's better and worse answer; None if it is no pair."""
    return next((sides for sides in SIDES if sides[0] in row and sides[1] in row), None)


def refuse_compared(row: Mapping[str, Any], named: bool = False) -> None:
    """Raise UserError for a row with a label, and for a pair unless its fields are `named`: whoever learns from every
    answer alike would learn the bad ones as good ones."""
    fields = row if isinstance(row, Fields) else Fields(row)
    if isinstance(fields.peek(LABEL), bool):
        raise UserError(
            f"a row has the {LABEL} {str(fields.peek(LABEL)).lower()}, and here every answer is learned as a good one; "
            "train.py --data_type labels learns from both kinds; rename the field if it means something else"
        )
    sides = sides_of(fields)
    if sides and fields.holds(*sides) and not named:
        raise UserError(
            f"a row has two answers, {' and '.join(sides)}, which train.py --data_type pairs learns from; name the "
            "fields to learn from others alone"
        )


def pair(row: object, names: Sequence[str] = (), think: str = "", clean: bool = True) -> list[list[Segment]]:
    """Lay out a row as the segments of its better and of its worse answer, each with the prompt before it."""
    row = fields_of(row, PAIRS)
    if names:
        return [named_segments(row, (names[0], name), think, clean) for name in names[1:]]
    sides = sides_of(row)
    if not sides:
        raise unknown(row, f"pairs are {PAIRS}; rows of one answer are for --data_type sft")
    if sides == OPENAI and isinstance(row.peek("input"), dict):
        row = Fields(row["input"], row.read) | {side: row[side] for side in sides}
    answers = [row[side] if isinstance(row.peek(side), list | dict) else field(row, side) for side in sides]
    before = turns_before(row)
    if before is not None or not all(isinstance(answer, str) for answer in answers):
        better, worse = (turns(row, before, answer) for answer in answers)
    elif prompt := next((name for name in PROMPTS if name in row), None):
        rest = row.without(*sides, "text")
        found = [segments(rest | {PROMPTS[prompt]: answer}, think, clean) for answer in answers]
        row.read.discard(PROMPTS[prompt])  # of the row itself
        return found
    else:
        better, worse = map(dialogue, answers)
        if not better or not worse:
            raise UnknownForm(f"a row has no prompt, only {shown(row)}; pairs are {PAIRS}")
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(better, worse)))
    shared -= better == worse  # pairs of equal answers are counted as such
    return [behind_system(row, behind(one, shared, think, clean), clean) for one in (better, worse)]


def turns(row: Fields, before: list[Any] | None, answer: object) -> list[Any]:
    """The turns of a conversation that ends in `answer`: a text, a turn, or a list of turns, which is the whole
    conversation if its first turn is not the assistant's."""
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    after = answer if isinstance(answer, list) else [answer]
    if after and not answers(after[0]):
        row.read.update(TURNS)  # which begin it
        return after
    if before and answers(before[-1]):
        raise UserError("the turns before the answers end in one of the assistant's; leave it out")
    if before is None and isinstance(row.peek("prompt"), str):
        before = [{"role": "user", "content": row["prompt"]}]
    return [*(before or []), *after]


def answers(turn: object) -> bool:
    """Tell whether a turn is the assistant's or has no role. Raises UserError for an unknown role."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return not isinstance(role, str) or speaker(role) == "Assistant"


def dialogue(text: str) -> list[Any]:
    """The turns of a text in which each turn begins with its speaker's name; [] for any other text."""
    front, *rest = SPEAKER.split(text)
    turns = [{"role": role, "content": words} for role, words in zip(rest[::2], rest[1::2])]
    return [] if front.strip() else turns


def behind(conversation: list[Any], known: int, think: str, clean: bool) -> list[Segment]:
    """Lay out a conversation as segments; its first `known` turns do not count."""
    before = len(chat(conversation[:known])) if known else 0
    laid_out = chat(conversation, think, clean)
    return [(text, counts and place >= before) for place, (text, counts) in enumerate(laid_out)]


def labelled(row: object, names: Sequence[str] = (), think: str = "", clean: bool = True) -> list[Segment]:
    """Lay out a row as the segments of a prompt and an answer with a label; of a chat only the last answer counts."""
    row, label = fields_of(row, LABELS), names[2] if names else LABEL
    if label not in row:
        raise unknown(row, f"labelled rows have {LABELS}; rows without a label are for --data_type sft")
    if names:
        return named_segments(row, names[:2], think, clean)
    before, completion = turns_before(row), row.peek(COMPLETION)
    if before is None and not isinstance(completion, list | dict):
        return segments(row.without(label), think, clean)
    conversation = turns(row, before, row[COMPLETION]) if COMPLETION in row else before or []
    if len(conversation) < 2 or not answers(conversation[-1]):
        raise UserError("the turns of a labelled row are to end in one of the assistant's, which the label judges")
    return behind_system(row, behind(conversation, len(conversation) - 1, think, clean), clean)


def label_of(row: object, names: Sequence[str]) -> bool:
    """The label of a row that `labelled` lays out. Raises UserError for anything but true and false."""
    name = names[2] if names else LABEL
    value = row[name] if isinstance(row, dict) else None
    if not isinstance(value, bool):
        raise UserError(
            f"field {name!r} holds {quoted(value)}; a label is true for a desirable answer, or false for an "
            "undesirable one"
        )
    return value


def opened(row: object, names: Sequence[str] = (), think: str = "", clean: bool = True) -> list[Segment]:
    """Lay out a row as the segments of its prompt up to the point where its answer opens, none of which counts in the
    loss; think "on" asks every row for thinking. Raises UserError for an empty prompt."""
    row, words = fields_of(row, ASKED), STAND_IN[think]
    turns, question = None if names else turns_before(row), next((name for name in PROMPTS if name in row), None)
    if names:
        parts = named_segments(require_field(row, names[0]) | {"": words}, (names[0], ""), think, clean)
    elif turns is not None:
        before = turns[:-1] if turns and answers(turns[-1]) else turns
        turns = [*before, {"role": "assistant", "content": words}]
        parts = behind_system(row, chat(turns, think, clean), clean)
    elif question is not None:
        parts = segments(row.without("text") | {PROMPTS[question]: words}, think, clean)
    else:
        raise unknown(row, f"prompts are {ASKED}")
    row.read.update((*PROMPTS.values(), ANSWER))  # what the model's answer is judged by
    *prompt, _ = parts
    if not any(text.strip() for text, _ in prompt):
        raise UserError("the prompt is empty; write one, or leave the row out")
    return [(text, False) for text, _ in prompt]


def in_context(row: object, names: Sequence[str] = (), think: str = "", clean: bool = True) -> list[list[Segment]]:
    """Lay out a row as two documents: the segments of its context, none of which counts in the loss, and those of its
    question and answer, which alone a student reads. Raises UserError if one of the three has no words."""
    name = names[0] if names else CONTEXT
    row = require_field(fields_of(row, CONTEXTS), name)
    rest = row.without(name, "text")
    question = next((key for key in PROMPTS if key in rest), "")
    answer = PROMPTS.get(question, "")
    if question and ANSWER in rest and answer != ANSWER:  # whatever the question is called
        rest = rest.without(ANSWER) | ({} if answer in rest else {answer: row[ANSWER]})
    if not names and not any(key in rest for key in (*CHATS, answer)):
        raise unknown(row, f"rows with contexts have {CONTEXTS}")
    parts = named_segments(rest, names[1:], think, clean) if names else segments(rest, think, clean)
    for what, texts in (
        ("context", [field(row, name)]),
        ("question", [text for text, counts in parts if not counts]),
        ("answer", [text for text, counts in parts if counts]),
    ):
        if not any(text.strip() for text in texts):
            raise UserError(f"the {what} is empty; write one, or leave the row out")
    return [[(f"{field(row, name).strip()}{TURN_END}", False)], parts]
