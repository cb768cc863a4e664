"""Put problems to a model: it writes answers, or scores continuations."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..generate.continuation import Continuation, complete
from ..generate.loading import Subject
from ..generate.prompts import encode
from ..generate.settings import Sampling
from .layouts import stops_of_prompt
from .records import Record
from .scoring import score
from .task import AnswerTask, ChoiceTask, Problem, Task

GREEDY = Sampling(temperature=0)


class Manner(NamedTuple):
    """The settings of asking: the longest answer in tokens, the number of problems at a time, and the texts that end an
    answer besides its layout's own."""

    max_tokens: int
    batch: int
    stop: Sequence[str] = ()


def ask(manner: Manner, task: Task, subject: Subject, problems: Mapping[int, Problem]) -> Iterator[Record]:
    """Yield the Record of each problem, {number: Problem}, as it is done."""
    prompts = {number: encode(subject.tokenizer, problem.prompt, number) for number, problem in problems.items()}
    if isinstance(task, AnswerTask):
        found = write_answers(manner, task, subject, problems, prompts)
    else:
        assert isinstance(task, ChoiceTask)
        found = score_continuations(manner, task, subject, problems, prompts)
    for number, told in found:
        yield {"number": number, "prompt": problems[number].prompt, "answer": problems[number].answer, **told}


def write_answers(
    manner: Manner,
    task: AnswerTask,
    subject: Subject,
    problems: Mapping[int, Problem],
    prompts: Mapping[int, list[int]],
) -> Iterator[tuple[int, Record]]:
    """Yield (number, the answer and its judgement) of each problem as its answer ends."""
    numbers = list(problems)
    stops = [(*stops_of_prompt(problem.prompt), *manner.stop) for problem in problems.values()]
    for place, answer in write(subject, [prompts[n] for n in numbers], stops, GREEDY, manner.max_tokens, manner.batch):
        told = {"generated": answer.text, "end": answer.end}
        yield numbers[place], told | task.judge(answer.text, problems[numbers[place]])


def write(
    subject: Subject,
    prompts: Sequence[list[int]],
    stops: Sequence[tuple[str, ...]],
    sampling: Sampling,
    max_tokens: int,
    batch: int,
) -> Iterator[tuple[int, Continuation]]:
    """Continue prompts (lists of token ids), `batch` at a time; yield (place, Continuation) of each as it ends: at one
    of its stops, at the end of the document, or after max_tokens."""
    answers = [Continuation({}, subject.tokenizer, texts) for texts in stops]
    for place in complete(subject, prompts, answers, sampling, max_tokens, batch):
        yield place, answers[place]


def score_continuations(
    manner: Manner,
    task: ChoiceTask,
    subject: Subject,
    problems: Mapping[int, Problem],
    prompts: Mapping[int, list[int]],
) -> Iterator[tuple[int, Record]]:
    """Yield (number, the log-probabilities and their judgement) of each problem, manner.batch problems at a time, those
    of similar length together."""
    order = sorted(problems, key=lambda number: len(prompts[number]))
    for first in range(0, len(order), manner.batch):
        batch = order[first : first + manner.batch]
        texts = [[subject.tokenizer.encode(text) for text in problems[number].continuations] for number in batch]
        scored = score(subject.model, [prompts[number] for number in batch], texts, subject.start)
        for number, scores in zip(batch, scored):
            logprobs = [score.logprob for score in scores]
            yield number, {"logprobs": logprobs} | task.judge(scores, problems[number])
