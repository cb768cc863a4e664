"""The layouts in which a question is put to a model: those of the training data, and MetaMath's."""

from pathlib import Path
from types import MappingProxyType

from ..data.templates import stops_of
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
    """Return the text of a layout, by its name or from a file (without the newline at its end). Raises UserError if
    there is neither, or if the file is not UTF-8 or has no {question}."""
    if name in LAYOUTS:
        return LAYOUTS[name]
    try:
        text = Path(name).read_text(encoding="utf-8-sig").removesuffix("\n")
    except OSError:
        raise UserError(
            f"{flag} {name}: no such file, and no layout of that name; named are {', '.join(LAYOUTS)}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {name} is not UTF-8 (byte {error.start}); convert it") from error
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
