"""The layouts in which a question is put to a model: those of the training data, and MetaMath's."""

from types import MappingProxyType

from ..data.templates import layout_named, stops_of
from ..data.turns import TURN_END
from ..errors import UserError

FIELD = "{question}"
LAYOUTS = MappingProxyType(
    {
        "chat": "User: {question}\n\nAssistant:",
        "question": "Question: {question}\n\nAnswer:",
        "instruction": "Instruction: {question}\n\nResponse:",
        "plain": "{question}",
        # Alpaca's layout with the words that MetaMath's models were evaluated with
        "metamath": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step.",
    }
)
METAMATH_STOP = "\n\n### Instruction"


def read_layout(name: str, flag: str = "--template") -> str:
    """The text of one of LAYOUTS by its name, or a file's. Raises UserError if it has no {question}."""
    text = layout_named(name, LAYOUTS, flag)
    if FIELD not in text:
        raise UserError(f"{flag} {name}: it has no {FIELD}, the place of a question; add it")
    return text


def stops_of_prompt(prompt: str) -> tuple[str, ...]:
    """The texts that end an answer: the opening of the next question in a known layout, else none."""
    if "### Response:" in prompt:
        return (METAMATH_STOP,)
    return stops_of(prompt)


def example(prompt: str, solution: str) -> str:
    """Lay out a solved problem as an example before the question."""
    return prompt + solution.rstrip() + TURN_END
