"""`rwkv-peft study`: draw questions, train, measure; flags.py has the usage."""

import json
import signal
import sys
from pathlib import Path

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
from ...gpus import resolve_accelerator
from ...inference.loading import Subject
from ...models.parts import LanguageModel
from ...training.flags.request import Request, parse_run
from ...training.inputs import VALIDATION, find_samples
from ...training.model import adapt, build_model, own_device
from ...training.run import check, run, silent
from ...training.step.teacher import make_teacher
from .flags import Study, parse_flags
from .measure import ALONE, BEHIND, Word, verdict, word_of
from .questions import cut, draw, read_document

FIGURES = "study.json"


def main(argv: list[str]) -> int:
    """Run the command -> the exit code. Raises UserError for mistakes in flags and files."""
    study = parse_flags(argv)
    try:
        return learn(study)
    except KeyboardInterrupt as interrupt:
        print("interrupted; what was saved before is intact", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def learn(study: Study) -> int:
    """Draw questions unless there are some, train on them, and measure before and after -> the exit code."""
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
    behind, alone = (word_of(reader, held_out, document) for document in (BEHIND, ALONE))
    print(f"{counted(len(held_out), 'question')} held out; the model answers them")
    print(f"  with the text before it    {behind}")
    print(f"  without, before training   {alone}", flush=True)
    del reader
    code, words = run(request, print)
    if code:
        return code
    after = word_of(learner_of(request, base), held_out, ALONE)
    print(f"{words}\n  without, after training    {after}\n{verdict(behind, alone, after)}")
    write_figures(folder / FIGURES, held_out, {"with_text": behind, "before": alone, "after": after})
    return 0


def reader_of(request: Request, base: Base) -> Subject:
    """A base ready to read and answer, in the run's precision and on its device."""
    return subject_of(request, make_teacher(base, request.config, device_of(request)).model)


def learner_of(request: Request, base: Base) -> Subject:
    """Open what a run trained, ready to answer, with its adapter beside the base's weights, as it was in training."""
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
    """Draw questions about a document, and write them. Raises UserError if some are there, or hardly any are drawn."""
    if study.path.exists():
        raise UserError(
            f"{study.path} holds questions that were drawn before; learn from them with --rows {study.path}, or move "
            "them away"
        )
    tokenizer = reader.tokenizer
    parts = cut(text, study.part_tokens, lambda text: len(tokenizer.encode(text)))
    print(f"{study.document}: {counted(len(parts), 'part')} of up to {study.part_tokens} tokens", flush=True)
    with torch.inference_mode():
        rows = draw(reader, parts, study, lambda text: print(text, flush=True))
    if len(rows) < 2:
        raise UserError(
            f"{study.document}: the model asked {counted(len(rows), 'question')} that it answered itself, and one to "
            "learn and one to measure on are the least; give it its own layout with --ask, --answer and --stop, longer "
            "--question_tokens and --answer_tokens, or write questions yourself and give them as --rows"
        )
    write_text(study.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"wrote {counted(len(rows), 'question')} to {study.path}", flush=True)


def write_figures(path: Path, held_out: Samples, words: dict[str, Word]) -> None:
    """Write the words of the base and of what was trained as JSON."""
    figures = {"held_out": len(held_out)} | {name: word._asdict() for name, word in words.items()}
    write_text(path, json.dumps(figures, indent=2) + "\n")
