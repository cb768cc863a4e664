"""`rwkv-peft study`: generate questions on a document, train on them, and measure how likely the answers to held-out
questions are, with the text before them and without; flags.py has the usage."""

import json
import signal
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...checkpoints.atomic import write_text
from ...checkpoints.base import Base, open_base
from ...checkpoints.lock import alone_in
from ...checkpoints.readable import require_readable
from ...cli.errors import UserError
from ...cli.names import MODEL
from ...cli.parser import counted
from ...data.chat import TURN_END, stops_of
from ...data.recorded import find_tokenizer
from ...data.samples import Samples
from ...evals.frontier import Likelihood, likelihood
from ...evals.questions import GREEDY, last_answer, sample
from ...gpus import resolve_accelerator
from ...inference.forward import prefill
from ...inference.loading import Subject
from ...inference.settings import Sampling
from ...models.parts import LanguageModel
from ...training.flags.request import Request, parse_run
from ...training.inputs import VALIDATION, find_samples
from ...training.model import adapt, build_model, own_device
from ...training.run import check, run, silent
from ...training.step.teacher import make_teacher
from .flags import Study, parse_flags

FIGURES = "study.json"
BATCH = 32  # completions that are sampled at once
SEEDS = 1 << 24  # more than the questions of any document
MOST = 1 << 24  # bytes of a document
BORDERS = ("\n\n", "\n", ". ", " ")  # where to cut, the best places first
CHARACTERS = 64  # of a token, at most, when a part is cut
LEAST = 0.01  # of the gain by the text, that counts as learned
ALONE, BEHIND = 0, 1  # the documents of a sample: a question with its answer, and the same behind its context

Pairs = list[tuple[list[int], list[int]]]  # of a question's tokens and its answer's


def main(argv: list[str]) -> int:
    """Run the command -> the exit code. Raises UserError for mistakes in flags and files."""
    study = parse_flags(argv)
    try:
        return learn(study)
    except KeyboardInterrupt as interrupt:
        print("interrupted; what was saved before is intact", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def learn(study: Study) -> int:
    """Generate questions unless there are some, train on them, and measure before and after -> the exit code."""
    request, folder = parse_run(study.words), Path(study.output)
    base = request.base
    assert base is not None  # because --load_model is required
    resumes = request.config.train.resume and study.path.exists()
    check(request, silent)
    text = read_document(study.document) if study.document and not resumes else ""
    if study.rows:
        missing = f"--rows {study.rows}: no such file; it holds questions as this command writes them"
        require_readable(study.rows, missing)
    (request.teacher or base).require_finite()
    reader = reader_of(request, request.teacher or base)
    if text:
        with alone_in(folder, flag="--output"):
            write_questions(study, text, reader)
    held_out = find_samples(request.config)[1][VALIDATION]
    behind, alone = (measured(reader, held_out, document) for document in (BEHIND, ALONE))
    print(f"{counted(len(held_out), 'question')} held out; the model answers them")
    print(f"  with the text before it    {behind}")
    print(f"  without, before training   {alone}", flush=True)
    del reader
    code, words = run(request, print)
    if code:
        return code
    after = measured(learner_of(request, base), held_out, ALONE)
    print(f"{words}\n  without, after training    {after}\n{verdict(behind, alone, after)}")
    figures = {"with_text": behind._asdict(), "before": alone._asdict(), "after": after._asdict()}
    write_text(folder / FIGURES, json.dumps({"held_out": len(held_out), **figures}, indent=2) + "\n")
    return 0


def reader_of(request: Request, base: Base) -> Subject:
    """A base ready to generate, in the run's precision and on its device."""
    device = own_device(resolve_accelerator(request.config.train), 0)
    return subject_of(request, make_teacher(base, request.config, device))


def learner_of(request: Request, base: Base) -> Subject:
    """The trained model, ready to generate, with its adapter beside the base's weights, as it was in training."""
    config, folder = request.config, Path(request.config.train.proj_dir)
    if config.adapter.whole_model:
        return reader_of(request, open_base(folder / MODEL))
    model, device = build_model(config, base.family, base), own_device(resolve_accelerator(config.train), 0)
    adapt(model, config.adapter, request.layers, base.family, base, dict, folder, device)
    return subject_of(request, model.requires_grad_(False).eval().to(device))


def subject_of(request: Request, model: LanguageModel) -> Subject:
    tokenizer = find_tokenizer(request.config.data.tokenizer, request.config.model.vocab_size)
    return Subject(model, model.tuned_states(), tokenizer)


def write_questions(study: Study, text: str, reader: Subject) -> None:
    """Generate questions on a document, and write them. Raises UserError if there are some already, or hardly any are
    generated."""
    if study.path.exists():
        raise UserError(
            f"{study.path} holds questions that were drawn before; learn from them with --rows {study.path}, or move "
            "them away"
        )
    tokenizer = reader.tokenizer
    parts = cut(text, study.part_tokens, lambda text: len(tokenizer.encode(text)))
    print(f"{study.document}: {counted(len(parts), 'part')} of up to {study.part_tokens} tokens", flush=True)
    with torch.inference_mode():
        rows = generate_rows(reader, parts, study)
    if len(rows) < 2:
        raise UserError(
            f"{study.document}: the model asked {counted(len(rows), 'question')} that it answered itself, and one to "
            "learn and one to measure on are the least; give it its own layout with --ask, --answer and --stop, longer "
            "--question_tokens and --answer_tokens, or write questions yourself and give them as --rows"
        )
    write_text(study.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"wrote {counted(len(rows), 'question')} to {study.path}", flush=True)


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
    """Sample the questions of a model that has read a part, without those left out."""
    prompt = reader.tokenizer.encode(study.ask)
    stops = (*stops_of(study.ask), *study.stop, "\n")
    found: dict[str, None] = {}
    prompts = dict.fromkeys(range(study.questions), prompt)  # one list, which is read once
    stopped, most = dict.fromkeys(prompts, stops), study.question_tokens
    for question in sorted(sample(reader, prompts, stopped, sampling, most, BATCH)):
        text = question.text.strip()
        if question.end == "length" or not text:
            left_out["questions without end or words"] += 1
        elif text in found:
            left_out["questions that were asked before"] += 1
        else:
            found[text] = None
    return list(found)


def answered(reader: Subject, study: Study, questions: Sequence[str], left_out: Counter[str]) -> list[dict[str, str]]:
    """Answer questions greedily by a model that has read their part -> rows without their context."""
    layout = study.answer or "User: {question}\n\nAssistant:"
    prompts = [layout.replace("{question}", question) for question in questions]
    stops = {place: (*stops_of(prompt), *study.stop) for place, prompt in enumerate(prompts)}
    tokens = dict(enumerate(map(reader.tokenizer.encode, prompts)))
    rows = []
    for answer in sorted(sample(reader, tokens, stops, GREEDY, study.answer_tokens, BATCH)):
        if answer.end == "length" or not answer.text.strip():
            left_out["answers without end or words"] += 1
        elif study.answer:
            end = study.stop[0] if study.stop and answer.end == "stop" else ""
            rows.append({"prompt": prompts[answer.number], "completion": answer.text + end})
        else:
            rows.append({"question": questions[answer.number], "answer": answer.text.strip()})
    return rows


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
    """Cut a text into parts of a length of `most`, at the ends of paragraphs, or else of lines, sentences and words, if
    there is one behind the first quarter of the part."""
    parts = []
    while text := text.strip():
        window = min(len(text), most * CHARACTERS)
        end = max(1, bisect_right(range(window + 1), most, key=lambda end: length(text[:end])) - 1)
        if end < len(text):
            reach = {border: end + len(border) - len(border.strip()) for border in BORDERS}  # parts lose their spaces
            places = (text.rfind(border, 0, reach[border]) + len(border) for border in BORDERS)
            end = next((place for place in places if place > max(1, end // 4)), end)
        parts.append(text[:end].strip())
        text = text[end:]
    return parts


def measured(subject: Subject, samples: Samples, document: int) -> Likelihood:
    """The Likelihood of the answers in one document (ALONE, BEHIND) of samples."""
    return likelihood(subject.model, subject.start, answers_by_context(samples, document, subject.tokenizer.end_id))


def answers_by_context(samples: Samples, document: int, end_id: int | None) -> dict[tuple[int, ...], Pairs]:
    """{tokens of a context: the tokens of its questions and answers}; the context is () if they are ALONE. An answer
    lacks the end of the document, which a text that goes on does not have."""
    found: dict[tuple[int, ...], Pairs] = {}
    for n in range(len(samples)):
        sample = samples[n]
        assert isinstance(sample, list)  # because these are rows with contexts
        if pair := last_answer(sample[ALONE]):
            prompt, answer = map(list, pair)
            before = len(sample[document][0]) - len(sample[ALONE][0])
            context = tuple(sample[document][0][:before].tolist())
            ends = answer[-1] == end_id and len(answer) > 1
            found.setdefault(context, []).append((prompt, answer[:-1] if ends else answer))
    return found


def verdict(behind: Likelihood, alone: Likelihood, after: Likelihood) -> str:
    """A line on the success, by the base's Likelihoods with the text and without, and the trained model's
    without."""
    helped, learned = alone.nats - behind.nats, alone.nats - after.nats
    if helped <= 0:
        return "nothing can be learned: the text before the questions does not make their answers likelier to the model"
    if learned < LEAST * helped:
        why = "raise the rate or the number of epochs, or train an adapter (--peft bone)"
        return f"nothing was learned: without the text the answers are no likelier than before; {why}"
    return f"learned {min(learned / helped, 1):.0%} of what the text before the questions tells"
