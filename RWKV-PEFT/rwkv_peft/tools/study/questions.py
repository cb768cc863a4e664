"""Questions on the parts of a document, which a model generates and answers itself, with each part read once."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from ...checkpoints.readable import require_readable
from ...cli.errors import UserError
from ...data.chat import TURN_END, stops_of
from ...evals.questions import GREEDY, SampledCompletion, sample
from ...inference.forward import prefill
from ...inference.loading import Subject
from ...inference.settings import Sampling
from .flags import Study

SEEDS = 1 << 24  # more than the questions of any document
BATCH = 32
MOST = 1 << 24  # bytes of a document
BORDERS = ("\n\n", "\n", ". ", " ", "")  # where to cut, the best places first


def generate_rows(reader: Subject, parts: Sequence[str], study: Study) -> list[dict[str, str]]:
    """Generate questions on the parts of a document, with answers -> rows of --data_type contexts. Questions that
    repeat an earlier one of their part, and texts without words or end, are left out; their numbers are printed."""
    rows, left_out = list[dict[str, str]](), Counter[str]()
    for place, part in enumerate(parts):
        _, state = prefill(reader.model, [reader.tokenizer.encode(part + TURN_END)], reader.start)
        behind = reader._replace(start=state)
        seed = study.seed * SEEDS + place * study.questions
        sampling = Sampling(temperature=study.temperature, top_p=study.top_p, seed=seed)
        found = answered(behind, study, generate_questions(behind, study, sampling, left_out), left_out)
        rows += [{"context": part, **row} for row in found]
        print(f"part {place + 1} of {len(parts)}: {len(found)} questions", flush=True)
    for what, number in left_out.items():
        print(f"left out: {number} {what}", flush=True)
    return rows


def generate_questions(reader: Subject, study: Study, sampling: Sampling, left_out: Counter[str]) -> list[str]:
    prompt = reader.tokenizer.encode(study.ask)
    stops = (*stops_of(study.ask), *study.stop, "\n")
    found: dict[str, None] = {}
    prompts = dict.fromkeys(range(study.questions), prompt)  # one list, which is read once
    for question in completions(reader, prompts, dict.fromkeys(prompts, stops), sampling, study.question_tokens):
        text = question.text.strip()
        if question.end == "length" or not text:
            left_out["questions without end or words"] += 1
        elif text in found:
            left_out["questions that were asked before"] += 1
        else:
            found[text] = None
    return list(found)


def answered(reader: Subject, study: Study, questions: Sequence[str], left_out: Counter[str]) -> list[dict[str, str]]:
    layout = study.answer or "User: {question}\n\nAssistant:"
    prompts = [layout.replace("{question}", question) for question in questions]
    stops = {place: (*stops_of(prompt), *study.stop) for place, prompt in enumerate(prompts)}
    tokens = dict(enumerate(map(reader.tokenizer.encode, prompts)))
    rows = []
    for answer in completions(reader, tokens, stops, GREEDY, study.answer_tokens):
        if answer.end == "length" or not answer.text.strip():
            left_out["answers without end or words"] += 1
        elif study.answer:
            end = study.stop[0] if study.stop and answer.end == "stop" else ""
            rows.append({"prompt": prompts[answer.number], "completion": answer.text + end})
        else:
            rows.append({"question": questions[answer.number], "answer": answer.text.strip()})
    return rows


def completions(
    reader: Subject,
    prompts: dict[int, list[int]],
    stops: dict[int, tuple[str, ...]],
    sampling: Sampling,
    max_tokens: int,
) -> list[SampledCompletion]:
    """The Completions of all prompts, in their order."""
    return sorted(sample(reader, prompts, stops, sampling, max_tokens, BATCH))


def read_document(path: str) -> str:
    """Read the text of a document. Raises UserError for one that cannot be read, is too long, or holds no words."""
    missing = f"{path}: no such file; the first word names the document, which is a text"
    file = require_readable(path, missing)
    if (size := file.stat().st_size) > MOST:
        raise UserError(f"{path} has {size:,} bytes, and a document {MOST:,} at most; study it in several pieces")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}); a document is a text: convert it") from error
    if not text.strip():
        raise UserError(f"{path} holds no words, so that there is nothing to learn; name another document")
    return text


def cut(text: str, most: int, length: Callable[[str], int]) -> list[str]:
    """Cut a text into parts of a length of `most`, at the ends of paragraphs, or else of lines, sentences and words."""
    return [part.strip() for part in joined(pieces(text, most, length, BORDERS), most, length) if part.strip()]


def pieces(text: str, most: int, length: Callable[[str], int], borders: Sequence[str]) -> Iterator[str]:
    """Yield pieces that make up a text, none longer than `most` if a border within allows it."""
    if not borders or length(text) <= most:
        yield text
        return
    border, *others = borders
    *words, last = text.split(border) if border else list(text)
    for word in [*(word + border for word in words), last]:
        yield from pieces(word, most, length, others)


def joined(parts: Iterator[str], most: int, length: Callable[[str], int]) -> Iterator[str]:
    """Yield consecutive pieces as few texts that are not longer than `most`."""
    whole = ""
    for piece in parts:
        if whole and length(whole + piece) > most:
            yield whole
            whole = ""
        whole += piece
    yield whole
