"""Questions to a model: the one sampler of completions, problems of a task, and the exams that a run gives its model.

An exam is read and checked before training begins. `exam.ask(model, rank, ranks)` yields a
Record of every `ranks`-th question, `exam.score(records)` scores all of them.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..cli.errors import UserError
from ..cli.tables import TASKS
from ..config import TrainConfig
from ..data.chat import CHAT, ChatLayout, stops_of
from ..data.masks import undesirable
from ..data.mixture import Several
from ..data.samples import Document, DocumentSamples, Samples
from ..data.tokenizer import Tokenizer
from ..inference.decode import generate
from ..inference.flags import unescaped
from ..inference.loading import Subject
from ..inference.prompts import encode
from ..inference.settings import Sampling
from ..inference.text import Continuation
from .rows import Choices, Problem, Task, layout_of, read_problems, stops_of_prompt
from .scoring import score

GREEDY = Sampling(temperature=0)
LONGEST = 64  # tokens of an answer to a row that are generated and compared
OF = " of "  # between the words for data and the name of a source
SEARCHED = 16  # samples that are looked through for each row that is due
Record = dict[str, Any]  # one question with its answer and judgement; "number" is its place


class SampledCompletion(NamedTuple):
    """A sampled completion of the prompt of this number: its tokens, with the one that ends it, and their text; end is
    "end" (of the document), "stop" or "length". If the Sampling is `measured`, each token has its log-probability
    and the entropy of its distribution, in nats, else zeros."""

    number: int
    tokens: list[int]
    text: str
    end: str
    logprobs: list[float]
    entropies: list[float]


def sample(
    subject: Subject,
    prompts: Mapping[int, list[int]],
    stops: Mapping[int, Sequence[str]],
    sampling: Sampling,
    max_tokens: int,
    batch: int,
) -> Iterator[SampledCompletion]:
    """Sample a completion of each prompt, {number: token ids}, `batch` at a time; yield each SampledCompletion as it
    ends: at one of its stop texts, at the end of the document, or after max_tokens.

    A number seeds its draws, so that a completion does not depend on the other prompts. Prompts that are one list are
    read once.
    """
    model, start, tokenizer = subject
    texts = {number: Continuation({}, tokenizer, stops[number]) for number in prompts}
    measured: dict[int, list[tuple[float, float]]] = {number: [] for number in prompts}

    def ends(number: int, token: int) -> str:
        return texts[number].feed(token)

    for step in generate(model, prompts, sampling, max_tokens, ends, start, batch, tokenizer.vocab_size):
        measured[step.number].append((step.logprob, step.entropy))
        if step.end:
            text = texts.pop(step.number)
            text.finish(step.end)
            logprobs, entropies = map(list, zip(*measured.pop(step.number)))
            yield SampledCompletion(step.number, text.tokens, text.text, text.end, logprobs, entropies)
    for number in texts:  # max_tokens is 0
        yield SampledCompletion(number, [], "", "length", [], [])


def ask(
    task: Task, subject: Subject, problems: Mapping[int, Problem], batch: int, max_tokens: int, stop: Sequence[str] = ()
) -> Iterator[Record]:
    """Yield the Record of each problem, {number: Problem}, as it is done, `batch` at a time. Generated answers have at
    most max_tokens, and end at a text of `stop` or of their layout."""
    prompts = {number: encode(subject.tokenizer, problem.prompt, number) for number, problem in problems.items()}

    def record(number: int, found: Record) -> Record:
        problem = problems[number]
        return {"number": number, "prompt": problem.prompt, "answer": problem.answer, **found}

    if not isinstance(task, Choices):
        stops = {number: (*stops_of_prompt(problem.prompt), *stop) for number, problem in problems.items()}
        for found in sample(subject, prompts, stops, GREEDY, max_tokens, batch):
            judged = task.score(found.text, problems[found.number].answer)
            yield record(found.number, {"generated": found.text, "end": found.end, **judged})
        return
    order = sorted(problems, key=lambda number: len(prompts[number]))  # those of similar length together
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        texts = [[subject.tokenizer.encode(text) for text in problems[number].continuations] for number in numbers]
        for number, scores in zip(numbers, score(subject.model, [prompts[n] for n in numbers], texts, subject.start)):
            logprobs = [score.logprob for score in scores]
            yield record(number, {"logprobs": logprobs} | task.score(logprobs, problems[number]))


def digest_of(questions: object) -> str:
    """The hash of questions, by which ranks compare theirs: 16 hex digits of SHA-256."""
    return hashlib.sha256(repr(questions).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def share_of(measure: str, records: Sequence[Record]) -> float:
    """The share of records that are right by a measure."""
    return sum(bool(record.get(measure)) for record in records) / len(records)


class Judgement(NamedTuple):
    """The result of an exam: numbers for the run's metrics by name, records for a JSON file, and lines to print."""

    metrics: dict[str, float]
    lines: Sequence[Record]
    words: list[str]


class Exam:
    """The rows of --eval_data, --eval_limit of them at most, as problems of --eval_task. Raises UserError for unfit
    rows, and for prompts that the tokenizer cannot encode."""

    def __init__(self, train: TrainConfig, tokenizer: Any, chat: ChatLayout = CHAT) -> None:
        self.task, self.tokenizer = TASKS[train.eval_task](), tokenizer
        self.batch, self.max_tokens = train.eval_batch, train.eval_max_tokens
        self.stop = list(map(unescaped, train.eval_stop))
        layout = layout_of(self.task, train.eval_template, "--eval_template")
        rows = f"[:{train.eval_limit}]" if train.eval_limit else ""
        self.problems = read_problems(self.task, train.eval_data, rows, layout, chat)
        for number, problem in enumerate(self.problems):
            encode(tokenizer, problem.prompt, number)

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def digest(self) -> str:
        return digest_of(self.problems)

    def ask(self, model: Any, rank: int = 0, ranks: int = 1) -> Iterator[Record]:
        """Yield the Record of every `ranks`-th problem from number `rank` on. The model starts from the states that it
        tunes, if any; its mode (train or eval) and its weights stay as they are."""
        problems = {number: self.problems[number] for number in range(rank, len(self.problems), ranks)}
        subject = Subject(model, model.tuned_states(), self.tokenizer)
        return ask(self.task, subject, problems, self.batch, self.max_tokens, self.stop)

    def score(self, records: Sequence[Record]) -> Judgement:
        """Score all records: the share that is right, by each measure of the task; the first is "score"."""
        first, *others = self.task.measures
        shares = {"score": share_of(first, records)}
        shares |= {name.replace(" ", "_"): share_of(name, records) for name in others}
        listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        metrics = {f"eval_{name}": share for name, share in shares.items()}
        return Judgement(metrics, records, [f"of {len(records):,} questions right: {listed}"])


class Row(NamedTuple):  # its name is in the digests of rows.jsonl
    """A row of a run's own data: the name of the data, the tokens before its last answer, and the answer's, with the
    one that ends it."""

    of: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def rows_of(of: str, samples: Samples, number: int) -> list[Row]:
    """The first `number` rows of samples that have a prompt and an answer; of a packed sample the first row. A stream
    has none. Several data sets share the number, and have at least one each."""
    if isinstance(samples, Several):
        each = max(1, number // len(samples.sources))
        parts = (rows_of(f"{of}{OF}{name}", part, each) for name, part in samples.sources.items())
        return [row for rows in parts for row in rows]
    samples = samples.head()
    if not isinstance(samples, DocumentSamples):
        return []
    rows: list[Row] = []
    for n in range(min(len(samples), SEARCHED * number)):
        sample = samples[n]
        found = last_answer(sample[0] if isinstance(sample, list) else sample)
        if found and len(rows) < number:
            rows.append(Row(of, *found))
    return rows


def last_answer(document: Document) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The tokens before the last stretch that counts in the loss, and its tokens; None if all tokens count, or none, or
    the answer is an undesirable one."""
    tokens, mask = document[0].tolist(), document[1].tolist()  # mask[i] is true if tokens[i + 1] counts
    if undesirable(document[1]):
        return None
    end = len(tokens)
    while end > 1 and not mask[end - 2]:
        end -= 1
    begin = end
    while begin > 1 and mask[begin - 2]:
        begin -= 1
    return (tuple(tokens[:begin]), tuple(tokens[begin:end])) if 1 < begin < end else None


class RowsExam:
    """Rows of a run's own data, to compare the model's answers with theirs; texts of `stops` end an answer, as the next
    turn does. Raises UserError without rows."""

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, batch: int, stops: Sequence[str] = ()) -> None:
        if not rows:
            raise UserError("the data holds no rows of a prompt and an answer")
        self.rows, self.tokenizer, self.batch = rows, tokenizer, batch
        self.prompts = [tokenizer.decode(list(row.prompt)) for row in rows]
        self.stops = [(*stops_of(prompt), *stops) for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        return digest_of(self.rows)

    def ask(self, model: Any, rank: int = 0, ranks: int = 1) -> Iterator[Record]:
        """Yield {"number", "text", "end"} of every `ranks`-th row from number `rank` on, as Exam does."""
        subject = Subject(model, model.tuned_states(), self.tokenizer)
        prompts = {n: list(self.rows[n].prompt) for n in range(rank, len(self.rows), ranks)}
        for found in sample(subject, prompts, dict(enumerate(self.stops)), GREEDY, LONGEST, self.batch):
            yield {"number": found.number, "text": found.text, "end": found.end}

    def answer(self, number: int) -> Record:
        """{"text", "end"} of the row's own answer, cut as a completion is."""
        continuation = Continuation({}, self.tokenizer, self.stops[number])
        ends = (continuation.feed(token) for token in self.rows[number].answer[:LONGEST])
        continuation.finish(next(filter(None, ends), "length"))
        return {"text": continuation.text, "end": continuation.end}
