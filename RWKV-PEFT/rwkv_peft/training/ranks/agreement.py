"""Compare what ranks must share before a run begins: their flags, data, base, checkpoint and code."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...checkpoints.adapters import adapter_of_run
from ...checkpoints.digest import digest_below, digest_of
from ...config import RunConfig
from ...config.setting import flag_of
from ..flags.parser import DIMENSIONS
from ..flags.world import World

# settings that may differ from node to node: paths, because contents are compared instead, and two that no step uses
FREE = (
    "load_model path more tokenizer val_data more_val retain_data eval_data eval_template lm_eval_include_path "
    "proj_dir load init state_load teacher teacher_adapters teacher_state wandb trackio swanlab join_minutes"
).split()
LIBRARIES = ("torch", "deepspeed", "lightning", "numpy")
SHOWN = 4  # differences that a message names


def passport(config: RunConfig, identity: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Collect {what is compared: its value} of this process, from its settings, a run's identity and `others`."""
    found = {}
    for settings in (config.model, config.adapter, config.data, config.train, config.objective):
        for field in fields(settings):
            if field.name not in FREE:
                flag = flag_of(field)
                named = flag or (field.name if field.name in dict(DIMENSIONS) else None)
                found[f"--{named}" if named else field.name] = getattr(settings, field.name)
    data = identity["data"]
    found |= {
        "the objective": found.pop("name"),
        "the data": f"{data['content']} ({data['samples']:,} samples)",
        "the tokens of the data that count": data["counted"],
        "the files of the data": data["files"],
        "the base's fingerprint": identity["base"],
        "the code of rwkv_peft": digest_of_code(),
        "the version of Python": ".".join(platform.python_version_tuple()[:2]),
    }
    found |= {f"the version of {name}": version(name) for name in LIBRARIES}
    return json.loads(json.dumps(found | dict(others)))


def digest_of_code() -> str:
    """The digest of the package's sources, kernels included: 16 hex digits of SHA-256."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in (package, package / "cpu", package / "cuda"):  # the last two may be links, which rglob skips
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def digests_of_inputs(config: RunConfig, goes_on: bool) -> dict[str, str]:
    """Digest the files besides data that a run starts from -> {what is compared: digest of the whole file}: base and
    teacher, because a fingerprint is only a sample, and unless the run `goes_on`, the adapter and states that it begins
    with."""
    adapter, states = config.adapter, config.train.state_load
    begins = {
        "the adapter to start from": adapter.load and digest_below(adapter_of_run(adapter.load)),
        "the factors that it began with": digest_of(adapter.init),
        "the states to start from": states and digest_of(adapter_of_run(states)),
    }
    teacher = config.objective
    always = {
        "the file of the base": digest_of(config.train.load_model),
        "the file of the teacher": digest_of(teacher.teacher or teacher.stored),
        "the teacher's adapters": " ".join(digest_below(adapter_of_run(path)) for path in teacher.teacher_adapters),
        "the teacher's states": teacher.teacher_state and digest_of(adapter_of_run(teacher.teacher_state)),
    }
    return always | ({} if goes_on else begins)


def disagreement(world: World, passports: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str:
    """Say how the first rank that differs from rank 0 does, by their passports and machines; "" if all agree."""
    for rank, theirs in enumerate(passports):
        ours = passports[0]
        different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if not different:
            continue
        told = "; ".join(f"{name} is {ours.get(name)!r} and {theirs.get(name)!r}" for name in different[:SHOWN])
        more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        return (
            f"{world.name(0)} on {hosts[0]} and {world.name(rank)} on {hosts[rank]} disagree: {told}{more}; give "
            "every node the same command, data, base and code"
        )
    return ""
