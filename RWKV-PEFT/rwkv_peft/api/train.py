"""rp.train: train.py's loop on a Model in this process, on one device.

It takes train.py's flags as settings, every objective with its rewards and environments, validation, checkpoints and
resuming; several ranks and whole models are train.py's alone.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..cli.errors import Diverged, UserError, quoted
from ..data.preprocess import SKIP
from ..data.recorded import chat_of
from ..gpus import gpu_memory
from ..training.flags.legacy import SYNONYMS
from ..training.flags.parser import parser_of_train
from ..training.flags.request import Request, open_request, parse_flags
from ..training.inputs import find_inputs
from ..training.loop import Metrics, StopRequest
from ..training.loop import train as take_steps
from ..training.measuring import find_questions
from ..training.prepared import TrainingRun
from ..training.ranks.world import World
from ..training.run import judging, require_more_to_train
from .adapters import precision_of
from .model import Model

# Flags that the Model, its adapter and this process stand for, and those that print or write something else
OTHERS = frozenset(
    "load_model model peft train_parts state_parts quant tokenizer precision accelerator devices num_nodes strategy "
    "context_parallel fresh_optimizer timeout_minutes join_minutes compile config write_config check_flags "
    "show_samples train_type train_stage data_file help".split()
)
MOST = 20  # settings that a message names


def train(
    model: Model,
    rows: Iterable[Mapping[str, Any]] | str | Path,
    *,
    proj_dir: str | Path | None = None,
    callback: Callable[[Metrics], object] | None = None,
    progress: bool = True,
    **settings: Any,
) -> list[Metrics]:
    """Train the adapter of a model on rows -> the metrics of each step, as in metrics.jsonl.

    rows are dicts in any layout of --data_type, also as a Dataset or a data frame, or a file of them; data_type is
    "sft" unless it is given ("pairs" for objective="dpo", "prompts" for objective="grpo" with
    reward="rewards.py:exact", …). settings are flags of train.py, with its defaults: epoch_count, lr_init, ctx_len,
    micro_bsz, val_split, …

    proj_dir: the folder for checkpoints, adapter and metrics.jsonl; resume="auto" goes on there. Without it nothing is
    written. callback(metrics) is called after each step. It ends the training by returning True. The losses equal
    train.py's on the same rows. Random numbers and signal handlers of the caller stay. Raises UserError.
    """
    if model.adapter is None:
        raise UserError("the model has no adapter to train; rp.add_adapter puts one in")
    if model.start is not None:
        raise UserError("the model starts from a state, and rows from none; load it without state=, and tune states")
    history, before = list[Metrics](), model.training
    cuda = [model.device] if model.device.type == "cuda" else []

    def note(metrics: Metrics) -> object:
        history.append(metrics)
        return callback is not None and callback(metrics)

    with (
        TemporaryDirectory() as folder,
        torch.random.fork_rng(cuda),
        prepared(model, rows, proj_dir, Path(folder), settings, progress) as run,
    ):
        if run is None:
            return history  # resume="auto" found a run that is complete
        model.chat = chat_of(vars(run.config.data))
        try:
            take_steps(run, StopRequest(), note)
        except Diverged as error:
            raise UserError(f"{error}; load the model again, and lower lr_init, or give it precision='fp32'") from error
        finally:
            model.train(before)
    return history


@contextmanager
def prepared(
    model: Model, rows: Any, proj_dir: str | Path | None, folder: Path, settings: Mapping[str, Any], progress: bool
) -> Iterator[TrainingRun | None]:
    """Within, have the Run of rp.train's arguments, None if there is nothing more to train. `folder` is temporary, for
    rows that are no file and for a run without proj_dir. Raises UserError."""
    temporary = folder / "rows.jsonl"
    file = Path(rows) if isinstance(rows, (str, Path)) else temporary
    if file is temporary:
        records = rows.to_dict("records") if hasattr(rows, "iterrows") else rows  # a data frame
        file.write_text("".join(map(line_of, records)), "utf-8")
    request = request_for(model, file, proj_dir or folder / "run", settings)
    Path(request.config.train.proj_dir).mkdir(parents=True, exist_ok=True)
    try:
        inputs = find_inputs(request, gpu_memory(model.device))
    except UserError as error:
        lines = [str(line) for line in error.args if SKIP not in str(line)]  # a list is filtered by its owner
        raise UserError(
            *(line.replace(f"{temporary}, line", "row").replace(str(temporary), "rows") for line in lines)
        ) from error
    if require_more_to_train(inputs, leads=True):
        yield None
        return
    config, questions = inputs.config, find_questions(inputs)
    if progress:
        print("\n".join(inputs.samples.notes), flush=True)
    with judging(config, (inputs.samples, *inputs.measured.values())) as judges:
        yield TrainingRun(
            *(inputs, questions, model.network, judges, model.device, World()),
            saves=proj_dir is not None,
            shows_progress=progress,
        )


def request_for(model: Model, file: Path, folder: str | Path, settings: Mapping[str, Any]) -> Request:
    """The Request that train.py's flags of these settings would make for a model with its adapter. Raises UserError."""
    flags = dict.fromkeys(action.dest for action in parser_of_train()._actions)
    known = [name for name in flags if name not in OTHERS]
    if unknown := [name for name in settings if name not in known]:
        meant = re.findall(r"--(\w+)", SYNONYMS.get(f"--{unknown[0]}", ""))  # by the word of another trainer
        near = [name for name in known if name in meant] or [name for name in known if unknown[0].rstrip("s") in name]
        raise UserError(
            f"{unknown[0]}={settings[unknown[0]]!r} is no setting of rp.train; it takes train.py's flags, such as "
            + ", ".join((near or known)[:MOST])
        )
    adapter = model.adapter
    assert adapter is not None  # train() has refused others
    defaults: dict[str, Any] = {
        **{"load_model": model.base.path, "data_file": file, "data_type": "sft", "proj_dir": folder},
        **{"tokenizer": model.tokenizer.name, "precision": precision_of(model), "answer_rows": 0},
        **{"peft": adapter.method, "train_parts": adapter.train_parts or None},
        "accelerator": "cpu" if model.device.type == "cpu" else "gpu",
    }
    argv: list[str] = []
    for name, value in (defaults | dict(settings)).items():
        if isinstance(value, (list, tuple)):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={int(value) if isinstance(value, bool) else value}")
    return open_request(parse_flags(argv)._replace(adapter=adapter))


def line_of(row: Any) -> str:
    """A row as a line of JSON. Raises UserError for one that is no dict, or holds anything else than JSON."""
    try:
        if isinstance(row, Mapping):
            return json.dumps(dict(row)) + "\n"
    except (TypeError, ValueError):
        pass
    raise UserError(f"rows: {quoted(row)} is no row; rows are a list of dicts of texts, numbers and lists")
