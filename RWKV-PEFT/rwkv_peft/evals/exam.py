"""The questions that a run puts to its model while it trains, read and checked before training begins: rows of
--eval_data, or rows of its own data, whose answers stand beside the model's."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..cli.errors import UserError
from ..cli.tables import TASKS
from ..config import TrainConfig
from ..data.collate import Document
from ..data.masks import undesirable
from ..data.mixture import Several
from ..data.samples import DocumentSamples, Samples
from ..data.templates import stops_of
from ..data.tokenizer import Tokenizer
from ..inference.continuation import Continuation
from ..inference.flags import unescaped
from ..inference.loading import Subject
from ..inference.prompts import encode
from .asking import GREEDY, ask, write
from .records import Record, digest_of, share_of
from .rows import layout_of, read_problems

LONGEST = 64  # tokens of an answer that are written and compared
OF = " of "  # between the words for data and the name of a source
SEARCHED = 16  # samples that are looked through for each row that is due


class Judgement(NamedTuple):
    """The result of a round of questions: numbers for the run's metrics by name, records for the lines of a JSON file,
    and lines of text to print."""

    metrics: dict[str, float]
    lines: Sequence[Record]
    words: list[str]


class Exam:
    """The rows of --eval_data, --eval_limit of them at most, as problems of --eval_task. Raises UserError for rows that
    are none or that the tokenizer cannot encode."""

    def __init__(self, train: TrainConfig, tokenizer: Any, clean: bool = True) -> None:
        self.task, self.tokenizer = TASKS[train.eval_task](), tokenizer
        self.batch, self.max_tokens = train.eval_batch, train.eval_max_tokens
        self.stop = list(map(unescaped, train.eval_stop))
        layout = layout_of(self.task, train.eval_template, "--eval_template")
        rows = f"[:{train.eval_limit}]" if train.eval_limit else ""
        self.problems = read_problems(self.task, train.eval_data, rows, layout, clean)
        for number, problem in enumerate(self.problems):
            encode(tokenizer, problem.prompt, number)  # raises UserError for a prompt that cannot be asked

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def digest(self) -> str:
        return digest_of(self.problems)

    def ask(self, model: Any, rank: int = 0, ranks: int = 1) -> Iterator[Record]:
        """Ask the model every `ranks`-th problem from number `rank` on; yield each Record as it is done. The model
        starts from the states that it tunes, if any; its mode (train or eval) and its weights stay as they are."""
        due = {number: self.problems[number] for number in range(rank, len(self.problems), ranks)}
        subject = Subject(model, model.tuned_states(), self.tokenizer)
        return ask(self.task, subject, due, self.batch, self.max_tokens, self.stop)

    def judge(self, records: Sequence[Record]) -> Judgement:
        """Judge all records. The score is the share that is right by the task's first measure."""
        strictest, *others = self.task.measures
        shares = {"score": share_of(strictest, records)}
        shares |= {name.replace(" ", "_"): share_of(name, records) for name in others}
        told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        return Judgement(
            {f"eval_{name}": share for name, share in shares.items()},
            records,
            [f"of {len(records):,} questions right: {told}"],
        )


class Row(NamedTuple):
    """`of` names the data that a row is of; prompt and answer are the tokens before its last answer and those of it,
    with what ends it."""

    of: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def rows_of(of: str, samples: Samples, number: int) -> list[Row]:
    """The first `number` rows that a run reads of samples and that have a prompt and an answer; of a packed sample the
    first row. A stream has none. Several data sets share the number, and have at least one each."""
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
    """(the tokens before the last stretch that counts in the loss, those of it); None if all counts, or nothing, or an
    undesirable answer."""
    tokens, mask = document[0].tolist(), document[1].tolist()  # mask[i] says whether tokens[i + 1] counts
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
    """Rows to be answered, in a tokenizer's tokens, `batch` of them at a time; texts of `stops` end an answer, as the
    next turn does. Raises UserError if there are none."""

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, batch: int, stops: Sequence[str] = ()) -> None:
        if not rows:
            raise UserError("the data holds no rows of a prompt and an answer")
        self.rows, self.tokenizer, self.batch = rows, tokenizer, batch
        self.kinds = [row.of for row in rows]
        self.prompts = [tokenizer.decode(list(row.prompt)) for row in rows]
        self.stops = [(*stops_of(prompt), *stops) for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        return digest_of(self.rows)

    def ask(self, model: Any, rank: int = 0, ranks: int = 1) -> Iterator[Record]:
        """{"number", "text", "end"} of every `ranks`-th row from number `rank` on, as it is answered. The model is
        asked from the states that it tunes, if any."""
        due = range(rank, len(self.rows), ranks)
        subject = Subject(model, model.tuned_states(), self.tokenizer)
        prompts, stops = [list(self.rows[n].prompt) for n in due], [self.stops[n] for n in due]
        for place, answer in write(subject, prompts, stops, GREEDY, LONGEST, self.batch):
            yield {"number": due[place], "text": answer.text, "end": answer.end}

    def answer(self, number: int) -> Record:
        """{"text", "end"} of the row's own answer, read as a model's is."""
        continuation = Continuation({}, self.tokenizer, self.stops[number])
        ends = (continuation.feed(token) for token in self.rows[number].answer[:LONGEST])
        continuation.finish(next(filter(None, ends), "length"))
        return {"text": continuation.text, "end": continuation.end}
