"""How a question is put to a model: the layouts that data is trained in, and MetaMath's."""

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
        # of Alpaca, with the words that MetaMath's models were evaluated with
        "metamath": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step.",
    }
)
METAMATH_STOP = "\n\n### Instruction"


def read_layout(name: str, flag: str = "--template") -> str:
    """The text of a layout, by its name or from a file (without the newline at its end). Raises UserError where there
    is neither, or it has no {question}."""
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
        raise UserError(f"{flag} {name}: it has no {FIELD}, where a question goes")
    return text


def stops_of_prompt(prompt: str) -> tuple[str, ...]:
    """The texts that end an answer: the opening of the next question in a layout that is known, else none."""
    if "### Response:" in prompt:
        return (METAMATH_STOP,)
    return stops_of(prompt)


def example(prompt: str, solution: str) -> str:
    """A solved problem, as it stands before the question that is asked."""
    return prompt + solution.rstrip() + TURN_END
