"""Draw answers to prompts by the model in training, adapters on, several to a prompt that is read once."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ...cli.errors import UNREADABLE, UserError, told
from ...config import RunConfig
from ...data.answer_samples import PromptSamples
from ...data.collate import collate_packed
from ...data.templates import stops_of
from ...data.tokenizer import Tokenizer
from ...inference.command import Continuation
from ...inference.decode import generate
from ...inference.flags import unescaped
from ...inference.settings import Sampling
from ...models.parts import LanguageModel
from ...objectives.draws import Draws
from ..step.compiling import uncompiled

SEEDS = 1 << 44  # more than the answers that any run draws: no two seeds of a run share a draw
FILE = "drawn-{}.jsonl"  # of a rank


class Manner(NamedTuple):
    """The manner of drawing answers: by a sampling, so many tokens at most, up to a text of `stop` or that of a known
    layout, `batch` answers at a time, in a tokenizer's tokens; compiles: the run compiles blocks."""

    sampling: Sampling
    longest: int
    stop: tuple[str, ...]
    batch: int
    tokenizer: Tokenizer
    compiles: bool

    @classmethod
    def of(cls, config: RunConfig, drawn: Draws, tokenizer: Tokenizer) -> "Manner":
        seed = config.train.random_seed * SEEDS
        sampling = Sampling(temperature=drawn.draw_temperature, top_p=drawn.top_p, seed=seed, measured=True)
        stop = tuple(map(unescaped, drawn.stop))
        return cls(sampling, config.data.max_completion_length, stop, drawn.batch, tokenizer, config.train.compile)


class Drawn(NamedTuple):
    """An answer: the tokens of its prompt and its own, with what ends it, their log-probabilities and entropies; its
    text, and why it ended: "end" (of the document), "stop" or "length"."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    entropies: list[float]
    text: str
    end: str

    @property
    def cut(self) -> bool:
        return self.end == "length"


def draw(
    model: LanguageModel,
    manner: Manner,
    samples: PromptSamples,
    numbers: Sequence[int],
    times: int,
    moved: Callable[[str], object],
) -> list[list[Drawn]]:
    """Draw `times` answers to each of samples of these numbers. The draws of an answer depend on the run's seed, the
    sample's number and its own alone. `moved` hears of each answer."""
    prompts = {number: samples.prompt(number) for number in numbers}
    due = {number * times + place: prompt for number, prompt in prompts.items() for place in range(times)}
    stops = {number: (*stops_of(manner.tokenizer.decode(prompt)), *manner.stop) for number, prompt in prompts.items()}
    texts = {key: Continuation({}, manner.tokenizer, stops[key // times]) for key in due}
    measured: dict[int, list[tuple[float, float]]] = {key: [] for key in due}
    trains = model.training
    model.eval()
    with uncompiled(manner.compiles):
        for step in generate(
            model,
            due,
            manner.sampling,
            manner.longest,
            lambda key, token: texts[key].feed(token),
            model.tuned_states(),
            manner.batch,
            manner.tokenizer.vocab_size,
        ):
            measured[step.number].append((step.logprob, step.entropy))
            if step.end:
                texts[step.number].finish(step.end)
                moved("the answers")
    model.train(trains)
    found: dict[int, list[Drawn]] = {number: [] for number in prompts}
    for key, answer in texts.items():
        logprobs, entropies = map(list, zip(*measured[key]))
        number = key // times
        found[number].append(Drawn(prompts[number], answer.tokens, logprobs, entropies, answer.text, answer.end))
    return list(found.values())


def packed(answers: Sequence[Drawn]) -> dict[str, torch.Tensor]:
    """A batch of whole rows, each a prompt with an answer, as collate_packed makes it; with the answers' lengths
    (answers,) and the log-probabilities by which they were drawn (n,)."""
    documents = []
    for answer in answers:
        tokens = torch.tensor([*answer.prompt, *answer.tokens])
        documents.append((tokens, torch.arange(1, len(tokens)) >= len(answer.prompt)))
    return collate_packed(documents) | {
        "lengths": torch.tensor([len(answer.tokens) for answer in answers]),
        "sampled": torch.tensor([logprob for answer in answers for logprob in answer.logprobs]),
    }


def write_drawn(folder: Path, rank: int, drawn: Mapping[int, Sequence[Drawn]]) -> None:
    """Write the answers to samples, by their numbers; nothing if there are none."""
    if drawn:
        lines = (json.dumps([number, answer]) + "\n" for number, answers in drawn.items() for answer in answers)
        (folder / FILE.format(rank)).write_text("".join(lines))


def read_drawn(folder: Path) -> dict[int, list[Drawn]]:
    """Read the answers of all ranks in a checkpoint, by the numbers of their samples. Raises UserError for damage."""
    found: dict[int, list[Drawn]] = {}
    for path in folder.glob(FILE.format("*")):
        try:
            for number, answer in map(json.loads, path.read_text().splitlines()):
                found.setdefault(number, []).append(Drawn(*answer))
        except UNREADABLE as error:
            raise UserError(f"{path} is damaged: {told(error)}; delete {folder} to resume from an older one") from error
    return found
