"""rp.train: fine-tune a Model in a plain loop of one process, on the data, rates and defaults of train.py.

train.py has all else: several GPUs, whole models, resuming, other objectives and optimizers.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..adapters.groups import parameter_groups
from ..cli.errors import UserError, quoted
from ..config import RunConfig
from ..data.batches import EvalBatches, TrainBatches
from ..data.preprocess import SKIP
from ..data.recorded import chat_of
from ..data.samples import Samples
from ..models.parts import LanguageModel
from ..training.engine.progress import Progress
from ..training.flags.request import parse_flags, request_of
from ..training.inputs import VALIDATION, find_samples, make_plan
from ..training.measuring import means, sums_over
from ..training.optimizers import make_optimizer
from ..training.rates import group_rates, with_chosen_epochs
from ..training.step.plan import Plan
from ..training.step.shared_prefix import tokens_read
from ..training.step.steps import Whole, seed_micro_batch, trainable
from .adapters import precision_of
from .model import Model

# the settings by their flags' names
SETTINGS = (
    *("ctx_len", "micro_bsz", "accumulate_grad_batches", "epoch_count", "epoch_steps", "dataload", "data_shuffle"),
    *("sft_field", "sft_long", "sft_think", "think_labels", "clean_turns", "tool_form", "random_seed"),
    *("lr_init", "lr_final", "lr_schedule", "warmup_steps", "state_lr", "layerwise_lr", "beta1", "beta2", "adam_eps"),
    *("weight_decay", "gradient_clip_val", "val_split", "val_seed", "val_every"),
)
Metrics = dict[str, Any]


def train(
    model: Model,
    rows: Iterable[Mapping[str, Any]],
    *,
    callback: Callable[[Metrics], object] | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[Metrics]:
    """Train the adapter of a model on rows -> the metrics of each step, as in metrics.jsonl.

    rows are dicts in any layout of --data_type sft: messages, a prompt and its completion, a text, … settings are flags
    of train.py, with its defaults: epoch_count, lr_init, ctx_len, micro_bsz, val_split, … callback(metrics) is called
    after each step, and ends the training by returning True. The losses equal train.py's on the same rows. Raises
    UserError.
    """
    config, samples, held_out = training_inputs(model, rows, settings)
    model.chat = chat_of(vars(config.data))
    plan = make_plan(config.train, samples, config.step_samples, None)
    every = config.train.val_every or plan.epoch_steps
    bar, history, before = Progress(plan) if progress else None, list[Metrics](), model.training
    if bar is not None:
        bar.say("\n".join(samples.notes))
    model.train()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            for metrics in take_steps(model.network, config, samples, plan):
                done = metrics["step"] + 1
                if held_out is not None and (done % every == 0 or done == plan.total_steps):
                    batches, step = EvalBatches(held_out, config.data.micro_bsz), Whole(config.objective)
                    (metrics["val_loss"],) = means(sums_over(batches, step, model.network, model.device).tolist())
                history.append(metrics)
                if bar is not None:
                    show_progress(bar, metrics)
                if callback is not None and callback(metrics):
                    break
    finally:
        model.train(before)
        if bar is not None:
            bar.close()
    return history


def show_progress(bar: Progress, metrics: Metrics) -> None:
    """Print a step's validation, and move the progress bar."""
    done, tokens = metrics["step"] + 1, metrics["tokens"]
    if "val_loss" in metrics:
        bar.say(f"step {done:,}: validation loss {metrics['val_loss']:.4f}")
    bar.update(f"loss {metrics['loss']:.4f}, lr {metrics['lr']:.1e}", done, tokens / metrics["tokens_per_s"], tokens)


def take_steps(network: LanguageModel, config: RunConfig, samples: Samples, plan: Plan) -> Iterator[Metrics]:
    """Take the optimizer steps of a plan, and yield the metrics of each. The optimizer moves float32 copies of weights
    in bfloat16, as ZeRO does, and gradients add up in float32."""
    train, device = config.train, network.emb.weight.device
    step, weights = Whole(config.objective), trainable(network)
    network.zero_grad()
    masters = [weight.detach().float() for weight in weights]  # in float32 the weights' own memory
    groups, master_of = parameter_groups(network, train.weight_decay, *group_rates(config)), dict(zip(weights, masters))
    optimizer = make_optimizer([group | {"params": [*map(master_of.get, group["params"])]} for group in groups], train)
    batches = TrainBatches(samples, config.data.micro_bsz, accumulate=train.accumulate_grad_batches, read_ahead=0)
    numbered = enumerate(batches)
    for number in range(plan.total_steps):
        began, rate = time.perf_counter(), train.rate_at(number, plan.total_steps)
        losses, tokens = list[torch.Tensor](), 0
        for micro, batch in islice(numbered, train.accumulate_grad_batches):
            seed_micro_batch(train.random_seed, micro)
            batch = step.prepare_inputs(batch, device)
            loss = step.loss(network, batch, batch["step_count"] or 1)
            loss.backward()
            losses.append(loss.detach())
            tokens += tokens_read(batch)
            for weight, master in zip(weights, masters):
                if weight.grad is not None:
                    master.grad = weight.grad.float() if master.grad is None else master.grad + weight.grad
                    weight.grad = None
        norm = torch.nn.utils.clip_grad_norm_(masters, train.gradient_clip_val or math.inf).item()
        total = sum(map(float, losses))
        if not math.isfinite(total + norm):
            raise UserError(
                f"the loss became {total:g}, its gradient's norm {norm:g}, at step {number + 1}; load the "
                "model again, and lower lr_init, or give it precision='fp32'"
            )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(weights, masters):
                weight.copy_(master)
        yield {
            "step": number,
            "samples": plan.samples_seen(number + 1),
            "epoch": number // plan.epoch_steps,
            "loss": total,
            "lr": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_s": round(tokens / (time.perf_counter() - began), 1),
        }


def training_inputs(
    model: Model, rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]
) -> tuple[RunConfig, Samples, Samples | None]:
    """(the RunConfig, samples and held-out samples) that train.py would have for rows. Raises UserError."""
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise UserError(
            f"{unknown[0]}={settings[unknown[0]]!r} is no setting of rp.train; known are {', '.join(SETTINGS)}; "
            "train.py has more"
        )
    if model.adapter is None:
        raise UserError("the model has no adapter to train; rp.add_adapter puts one in")
    if model.start is not None:
        raise UserError("the model starts from a state, and rows from none; load it without state=, and tune states")
    with TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        file.write_text("".join(map(line_of, rows)), "utf-8")
        given: dict[str, Any] = {
            **{"load_model": model.base.path, "data_file": file, "data_type": "sft", "proj_dir": folder},
            **{"tokenizer": model.tokenizer.name, "precision": precision_of(model)},
            **{"peft": model.adapter.method, "train_parts": model.adapter.train_parts or None},
        }
        argv: list[str] = []
        for name, value in (given | dict(settings)).items():
            if isinstance(value, (list, tuple)):
                argv += [f"--{name}", *map(str, value)]
            elif value is not None:
                argv.append(f"--{name}={int(value) if isinstance(value, bool) else value}")
        flags = parse_flags(argv)
        config = request_of(flags._replace(adapter=model.adapter)).config
        try:
            samples, measured = find_samples(config)
        except UserError as error:
            told = [str(line) for line in error.args if SKIP not in str(line)]  # a list is filtered by its owner
            lines = (line.replace(f"{file}, line", "row").replace(str(file), "rows") for line in told)
            raise UserError(*lines) from error
    train = with_chosen_epochs(config.train, -(-len(samples) // config.step_samples), None)
    return replace(config, train=train), samples, measured.get(VALIDATION)


def line_of(row: Any) -> str:
    """A row as a line of JSON. Raises UserError for one that is no dict, or holds anything else than JSON."""
    try:
        if isinstance(row, Mapping):
            return json.dumps(dict(row)) + "\n"
    except (TypeError, ValueError):
        pass
    raise UserError(f"rows: {quoted(row)} is no row; rows are a list of dicts of texts, numbers and lists")
