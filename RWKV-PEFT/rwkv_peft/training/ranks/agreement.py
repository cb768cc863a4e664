"""The values that ranks must share before a run begins: their flags, data, base, checkpoint, libraries and code."""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...checkpoints.adapters import adapter_of_run
from ...checkpoints.digest import digest_below, digest_of
from ...config import RunConfig
from ...config.setting import flag_of
from ..flags.parser import DIMENSIONS
from ..inputs import Inputs
from ..measuring import Questions
from .world import World

# settings that may differ from node to node: paths, because contents are compared instead, and two that no step uses
FREE = (
    "load_model path more replay tokenizer val_data more_val retain_data eval_data eval_template "
    "proj_dir load init state_load teacher wandb trackio swanlab join_minutes"
).split()
LIBRARIES = ("torch", "deepspeed", "lightning", "numpy")
SHOWN = 4  # differences that a message names


def shared_values(inputs: Inputs, asked: Questions) -> dict[str, Any]:
    """{name in a message: value, or digest of whole files} of all that a run's ranks must share, in JSON's types."""
    config, checkpoint = inputs.config, inputs.checkpoint
    data = {"the data": inputs.identity["data"]}
    data |= {f"the data of {name}_loss": identity for name, identity in inputs.of_measured.items()}
    values = {
        **{name: f"{identity['files']} ({identity['samples']:,} samples)" for name, identity in data.items()},
        "the base": config.train.load_model and digest_below(config.train.load_model),
        "the teacher": config.objective.teacher and digest_below(config.objective.teacher),
        "the code of rwkv_peft": digest_of_code(),
        "the version of Python": ".".join(platform.python_version_tuple()[:2]),
        **{f"the version of {name}": version(name) for name in LIBRARIES},
        "the checkpoint to go on from": checkpoint and checkpoint.name,
        "the questions of --eval_data": "" if asked.exam is None else asked.exam.digest,
        "the rows to answer": "" if asked.rows is None else asked.rows.digest,
    }
    if checkpoint is None:  # a run that goes on reads none of these
        adapter, states = config.adapter, config.train.state_load
        values["the adapter to start from"] = adapter.load and digest_below(adapter_of_run(adapter.load))
        values["the factors that it began with"] = digest_of(adapter.init)
        values["the states to start from"] = states and digest_of(adapter_of_run(states))
    shared: dict[str, Any] = json.loads(json.dumps(values_of(config) | values))
    return shared


def values_of(config: RunConfig) -> dict[str, Any]:
    """{flag, or field without one: value} of a run's settings without FREE."""
    values = {"the objective": config.objective.name}
    for settings in (config.model, config.adapter, config.data, config.train, config.objective):
        for field in fields(settings):
            if field.name not in (*FREE, "name"):
                flag = flag_of(field) or (field.name if field.name in dict(DIMENSIONS) else None)
                values[f"--{flag}" if flag else field.name] = getattr(settings, field.name)
    return values


def digest_of_code() -> str:
    """The digest of the package's sources, kernels included: 16 hex digits of SHA-256."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def sources() -> Iterator[Path]:
    """Yield the files of the package's code, in one order."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package, package / "cpu", package / "cuda"):  # the last two may be links, which rglob skips
        yield from (path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"))


def disagreement(world: World, values: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str:
    """A sentence on the first rank with other values than rank 0, by the ranks' values and machines; "" if there is
    none."""
    ours = values[0]
    for rank, theirs in enumerate(values):
        different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if not different:
            continue
        words = "; ".join(f"{name} is {ours.get(name)!r} and {theirs.get(name)!r}" for name in different[:SHOWN])
        more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        return (
            f"{world.name(0)} on {hosts[0]} and {world.name(rank)} on {hosts[rank]} disagree: {words}{more}; give "
            "every node the same command, data, base and code"
        )
    return ""
