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
    """{name in a message: value or digest} of all that a run's ranks must share, in JSON's types."""
    data, checkpoint = inputs.identity["data"], inputs.checkpoint
    values = {
        "the data": f"{data['content']} ({data['samples']:,} samples)",
        "the tokens of the data that count": data["counted"],
        "the files of the data": data["files"],
        "the base's fingerprint": inputs.identity["base"],
        "the code of rwkv_peft": digest_of_code(),
        "the version of Python": ".".join(platform.python_version_tuple()[:2]),
        **{f"the version of {name}": version(name) for name in LIBRARIES},
        "the checkpoint to go on from": checkpoint and checkpoint.name,
        **digests_of_inputs(inputs.config, goes_on=checkpoint is not None),
        **{f"the data of {name}_loss": one["content"] + one["files"] for name, one in inputs.of_measured.items()},
        "the questions of --eval_data": "" if asked.exam is None else asked.exam.digest,
        "the rows to answer": "" if asked.rows is None else asked.rows.digest,
    }
    shared: dict[str, Any] = json.loads(json.dumps(values_of(inputs.config) | values))
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


def digests_of_inputs(config: RunConfig, goes_on: bool) -> dict[str, str]:
    """{name in a message: digest of a whole file} of base and teacher, because a fingerprint is only a sample.

    A run that does not go on from a checkpoint adds the adapter and states that it begins with."""
    adapter, states, teacher = config.adapter, config.train.state_load, config.objective
    begins = {
        "the adapter to start from": adapter.load and digest_below(adapter_of_run(adapter.load)),
        "the factors that it began with": digest_of(adapter.init),
        "the states to start from": states and digest_of(adapter_of_run(states)),
    }
    always = {
        "the file of the base": digest_of(config.train.load_model),
        "the file of the teacher": digest_of(teacher.teacher),
    }
    return always | ({} if goes_on else begins)


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
