"""`rwkv-peft learn`: go on from a run's adapter with corrected answers and with the run's own rows between them, and
scale the new part back until no more is lost than allowed; flags.py has the usage."""

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from ...api.adapters import add_adapter, save_adapter
from ...api.model import Model, load
from ...api.train import request_for
from ...checkpoints.adapters import adapter_of_run
from ...checkpoints.best import labelled
from ...checkpoints.lock import alone_in
from ...cli.errors import Diverged, UserError
from ...cli.names import ADAPTER, LEARNED, LEARNED_ROWS
from ...cli.parser import counted
from ...config import DataConfig
from ...data.mixture import Mixture
from ...data.recorded import require_same
from ...data.samples import Samples
from ...data.sources import build_samples, split_samples
from ...evals.frontier import (
    KEPT,
    MEASURED,
    SCORED,
    Point,
    answers_in,
    draw,
    frontier,
    likelihood,
    table,
    write_figures,
)
from ...evals.questions import RowsExam, rows_of
from ...rewards import Judges
from ...training.inputs import VALIDATION, Inputs, find_inputs, make_plan
from ...training.loop import StopRequest, train
from ...training.measuring import BeforeAfter, Questions
from ...training.prepared import TrainingRun
from ...training.ranks.world import World
from ...training.rates import automatic_rate
from .flags import parse_flags

FIGURES, PICTURE = "learned.json", "learned.png"
ANSWERED = 4  # rows of a kind that are answered before and after
HELD = 0.1  # of the rows to replay, in place of validation rows
OF_RUN = (  # flags of a run about its data, which count here too
    *("ctx_len", "data_type", "dataload", "loss_mask", "sft_field", "sft_split", "sft_as", "sft_long", "sft_think"),
    *("think_labels", "clean_turns", "tool_form", "turns_in_text", "encoding", "document_end", "skip_bad_rows"),
    *("val_split", "val_seed", "val_data", "data_mix"),
)
CORRECTED, NEW = "feedback", "held out"


def main(argv: list[str]) -> int:
    """Run the command -> the exit code, 1 if no scale holds. Raises UserError for mistakes in flags and files."""
    args = parse_flags(argv)
    try:
        with alone_in(Path(args.run)):
            return learn(args)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def learn(args: Namespace) -> int:
    """Learn the feedback, find the largest scale that holds, and write the adapter, the figures and the picture."""
    flags, folder = args.settings, Path(args.run)
    settings = {"precision": flags.get("precision"), "tokenizer": flags.get("tokenizer"), "device": args.device}
    model = load(args.load_model or flags["load_model"], **settings)
    add_adapter(model, load=adapter_of_run(folder, tell=True))
    output = labelled(folder / ADAPTER, LEARNED)
    with TemporaryDirectory() as place:
        inputs = inputs_of(model, args, Path(place))
        learned, measured = samples_of(inputs, args)
        print("\n".join(learned[CORRECTED].row_notes))
        rows = [f"{len(samples):,} {name}" for name, samples in measured.items()]
        print(f"rows to measure, at most {MEASURED} of a kind: {', '.join(rows)}")
        samples = Mixture(learned, (), args.replay_share) if args.replay_share else learned[CORRECTED]
        plan = make_plan(inputs.config.train, samples, inputs.config.step_samples, None)
        engine: Any = SimpleNamespace(model=model.network, rank=0, ranks=1)
        asked = [row for name, part in measured.items() for row in rows_of(name, part, ANSWERED)]
        answers = BeforeAfter(RowsExam(asked, model.tokenizer, SCORED), folder / LEARNED_ROWS, False, anew=True)
        answers.before(engine)
        texts = {name: answers_in(part) for name, part in measured.items()}
        start = {name: tensor.clone() for name, tensor in trained(model).items()}
        steps, seconds = take_steps(model, replace(inputs, samples=samples, measured={}, plan=plan), args.minutes)
    end = {name: tensor.clone() for name, tensor in trained(model).items()}
    print(f"{counted(steps, 'step')} of {plan.total_steps:,} in {seconds:.0f} s", flush=True)

    def at(scale: float) -> Point:
        for name, tensor in trained(model).items():
            tensor.copy_(torch.lerp(start[name].float(), end[name].float(), scale))
        network, begun = model.network.eval(), model.begun()
        return Point(scale, {name: likelihood(network, begun, pairs) for name, pairs in texts.items()})

    points, best = frontier(at, args.forget_at_most)
    print(table(points, best))
    facts = {"scale": best.scale, "steps": steps, "seconds": round(seconds, 1)}
    write_figures(points, args.forget_at_most, folder / FIGURES, facts)
    draw(points, best, args.forget_at_most, folder / PICTURE)
    if not best.scale:
        print(f"nothing is written: each part of it loses more than --forget_at_most {args.forget_at_most:g}")
        return 1
    at(best.scale)
    save_adapter(model, output)
    answers.after(engine)
    print("\n".join(answers.lines()))
    print(f"wrote {output}, with {best.scale:.0%} of the new part, and {folder / PICTURE}")
    return 0


def inputs_of(model: Model, args: Namespace, place: Path) -> Inputs:
    """The Inputs of the run, or of rows of --replay in place of its own, with the settings of this command's steps.
    Raises UserError for rows that are gone, and for those that are no answers."""
    flags = args.settings
    settings = {"data_type": DataConfig.data_type} | {name: flags[name] for name in OF_RUN if name in flags}
    files = flags.get("data_file")
    if args.replay:
        settings, files = {"ctx_len": flags.get("ctx_len"), "data_type": "sft"}, args.replay
    assert model.adapter is not None  # because one was loaded
    rate = args.lr_init or automatic_rate(model.adapter, model.network.config.n_embd).value / 3
    steps = {"lr_init": rate, "lr_final": rate / 10, "epoch_count": args.epoch_count, "micro_bsz": args.micro_bsz}
    try:
        request = request_for(model, files, place, settings | steps | {"random_seed": args.random_seed})
        if not request.config.data.of_answers:
            raise UserError(
                f"it trained on --data_type {request.config.data.data_type}, of which no answers are learned"
            )
        return find_inputs(request)
    except UserError as error:
        remedy = "name rows to read between the feedback: --replay FILE"
        raise UserError(f"the rows of {args.run} cannot be replayed: {error}; {remedy}", offers=error.offers) from error


def samples_of(inputs: Inputs, args: Namespace) -> tuple[dict[str, Samples], dict[str, Samples]]:
    """({name: samples to learn}, the feedback's and those to replay, {name: samples to measure})."""
    data, vocab_size = inputs.config.data, inputs.config.model.vocab_size
    plain = replace(data.own, more=(), mix=(), data_type="sft", loss_mask="file", dataload="pad")
    plain = replace(plain, sft_field=(), sft_split="", sft_as="", turns_in_text="")

    def parts_of(path: str, share: float) -> Sequence[Samples]:
        """The samples of a file, and behind them a share that is held out."""
        config = replace(plain, path=path)
        whole = build_samples(config, vocab_size)
        return split_samples(config, vocab_size, share, args.random_seed) if share and len(whole) > 1 else [whole]

    feedback, *held_out = parts_of(args.feedback, args.hold_out)
    replayed, kept = inputs.samples, inputs.measured.get(VALIDATION)
    if args.keep:
        (kept,) = parts_of(args.keep, 0)
    elif kept is None:
        print(f"note: the run held no rows out; {HELD:.0%} of those that it learned are measured, and not replayed")
        replayed, kept = split_samples(data, vocab_size, HELD, args.random_seed)
    for samples in (feedback, kept):
        require_same(replayed.vocabulary, str(data.path), samples.vocabulary, "--feedback and --keep")
    measured = {CORRECTED: feedback, **dict(zip([NEW], held_out)), KEPT: kept}
    return {CORRECTED: feedback, "replay": replayed}, measured


def trained(model: Model) -> dict[str, torch.Tensor]:
    """The tensors that train, by name, as they are in the model."""
    return {name: tensor.detach() for name, tensor in model.network.named_parameters() if tensor.requires_grad}


def take_steps(model: Model, inputs: Inputs, minutes: float) -> tuple[int, float]:
    """Train for the steps of a plan, or so many minutes at most -> (steps, seconds). Raises UserError if the loss is
    not finite."""
    began = time.monotonic()
    run = TrainingRun(inputs, Questions(None, None), model.network, Judges(), model.device, World(), saves=False)
    try:
        steps = train(run, StopRequest(), lambda metrics: time.monotonic() - began > minutes * 60)
    except Diverged as error:
        raise UserError(f"{error}; lower --lr_init") from error
    return steps, time.monotonic() - began
