"""`rwkv-peft study`: generate questions on a document, train on them, and measure how likely the answers to held-out
questions are, with the text before them and without; flags.py has the usage."""

import json
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from ...checkpoints.atomic import write_text
from ...checkpoints.base import Base, open_base
from ...checkpoints.lock import alone_in
from ...checkpoints.readable import require_readable
from ...cli.errors import UserError
from ...cli.names import MODEL
from ...cli.parser import counted
from ...data.recorded import find_tokenizer
from ...data.samples import Samples
from ...evals.questions import last_answer
from ...evals.scoring import score
from ...gpus import resolve_accelerator
from ...inference.forward import prefill
from ...inference.loading import Subject
from ...models.parts import LanguageModel
from ...training.flags.request import Request, parse_run
from ...training.inputs import VALIDATION, find_samples
from ...training.model import adapt, build_model, own_device
from ...training.run import check, run, silent
from ...training.step.teacher import make_teacher
from .flags import Study, parse_flags
from .questions import cut, generate_rows, read_document

FIGURES = "study.json"
BATCH = 16  # questions that are scored at once
LEAST = 0.01  # of the gain by the text, that counts as learned
ALONE, BEHIND = 0, 1  # the documents of a sample: a question with its answer, and the same behind its context

Pairs = list[tuple[list[int], list[int]]]  # of a question's tokens and its answer's


class Likelihood(NamedTuple):
    """A model's mean loss of answers, in nats a token, and the share that it would answer word for word."""

    nats: float
    right: float

    def __str__(self) -> str:
        return f"{self.nats:.3f} nats a token, {self.right:.0%} word for word"


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
    behind, alone = (likelihood(reader, held_out, document) for document in (BEHIND, ALONE))
    print(f"{counted(len(held_out), 'question')} held out; the model answers them")
    print(f"  with the text before it    {behind}")
    print(f"  without, before training   {alone}", flush=True)
    del reader
    code, words = run(request, print)
    if code:
        return code
    after = likelihood(learner_of(request, base), held_out, ALONE)
    print(f"{words}\n  without, after training    {after}\n{verdict(behind, alone, after)}")
    figures = {"with_text": behind._asdict(), "before": alone._asdict(), "after": after._asdict()}
    write_text(folder / FIGURES, json.dumps({"held_out": len(held_out), **figures}, indent=2) + "\n")
    return 0


def reader_of(request: Request, base: Base) -> Subject:
    """A base ready to generate, in the run's precision and on its device."""
    return subject_of(request, make_teacher(base, request.config, device_of(request)))


def learner_of(request: Request, base: Base) -> Subject:
    """The trained model, ready to generate, with its adapter beside the base's weights, as it was in training."""
    config, folder = request.config, Path(request.config.train.proj_dir)
    if config.adapter.whole_model:
        return reader_of(request, open_base(folder / MODEL))
    model, device = build_model(config, base.family, base), device_of(request)
    adapt(model, config.adapter, request.layers, base.family, base, dict, folder, device)
    return subject_of(request, model.requires_grad_(False).eval().to(device))


def device_of(request: Request) -> torch.device:
    return own_device(resolve_accelerator(request.config.train), 0)


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


def likelihood(subject: Subject, samples: Samples, document: int) -> Likelihood:
    """The Likelihood of the answers in one document (ALONE, BEHIND) of samples; each context is read once."""
    logprob, right, tokens, number = 0.0, 0, 0, 0
    for context, pairs in answers_by_context(samples, document, subject.tokenizer.end_id).items():
        start = prefill(subject.model, [list(context)], subject.start)[1] if context else subject.start
        for first in range(0, len(pairs), BATCH):
            prompts, answers = zip(*pairs[first : first + BATCH])
            for [found] in score(subject.model, prompts, [[answer] for answer in answers], start):
                logprob += found.logprob
                right += found.greedy
        tokens, number = tokens + sum(len(answer) for _, answer in pairs), number + len(pairs)
    return Likelihood(-logprob / tokens, right / number)


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
