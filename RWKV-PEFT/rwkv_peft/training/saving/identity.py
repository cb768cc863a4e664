"""The identity of a run, which one that goes on must share: adapter, base, data, objective, teacher, ranks."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...cli.errors import UNREADABLE, UserError, told
from ...cli.tables import OPTIMS
from ...config import AdapterConfig, DataConfig, RunConfig, to_json
from ...data.mixture import shares_of
from ...data.samples import Samples
from .run_state import OPTIMIZER, STATE, read_state, remedy_of, require_files

HASHED = 64  # samples that are hashed, to tell one data set from another
SAME = ("adapter", "base", "data", "objective", "teacher")  # what a resumed run must share with the first
SAME_OPTIMIZER = ("precision", "optim")  # what it must share, too, to keep the optimizer's state,
SAME_RANKS = ("strategy", "world_size")  # and this, if it is kept by ranks
NEEDED = ("retained", "samples_seen", "trained", "validated_from", "validation")  # what else it must say
HASHES = MappingProxyType({"content": "tokens", "counted": "loss mask", "files": "files"})


def data_identity(config: RunConfig, samples: Samples) -> dict[str, Any]:
    """Identify the data, so that a sample number means the same in a resumed run: the settings that choose and order
    samples, how many there are, hashes of a few of them and of what counts there, and a digest of the files as a whole,
    wherever they lie."""
    settings = {
        name: value
        for name, value in asdict(config.data).items()
        if name not in ("path", "more", "tokenizer", "micro_bsz", "bucketed")
    }
    if not config.data.clean_turns:
        del settings["clean_turns"]  # as of a run of before there was such a setting
    if config.data.dataload == "pad":  # the order of samples depends on it (data/samples.py)
        settings["rows_share_batches"] = config.data.buckets
    settings["mix"] = shares_of(config.data.mix)  # 7 3 is the mix 0.7 0.3
    if config.train.val_seed is not None:
        settings["val_seed"] = config.train.val_seed
    content, counted = hashlib.sha256(), hashlib.sha256()
    head = samples.head()
    for n in range(0, len(head), -(-len(head) // HASHED)):
        sample = head.collate([head[n]])
        content.update(sample.get("teacher_tokens", sample["tokens"]).numpy().tobytes())
        counted.update(sample.get("weights", sample["mask"]).numpy().tobytes())
    hashes = {"content": content.hexdigest()[:16], "counted": counted.hexdigest()[:16]}
    hashes["files"] = digest_of_data(config, samples)
    return settings | {"val_split": config.train.val_split, "samples": len(samples)} | hashes


def digest_of_data(config: RunConfig, samples: Samples) -> str:
    """The digest of the token files that samples are read from, with weights, and masks if --loss_mask is file."""
    with_mask = config.data.loss_mask == "file"
    digests = "".join(part.dataset.digest(with_mask) for part in samples.parts)
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def read_run_state(checkpoint: Path, now: Mapping[str, Any], fresh_optimizer: bool = False) -> dict[str, Any]:
    """Read state.json of a checkpoint; compare it with `now`, the resuming run's own entries that must be the same,
    and the checkpoint's other files with the sizes in it. Raises UserError if they differ; fresh_optimizer leaves out
    what only the optimizer's state needs."""
    now = json.loads(json.dumps(now))
    try:
        state = {"teacher": ""} | read_state(checkpoint)  # 0.2.0 had none
        # a setting that the saved run did not know had its default
        defaults = {name: value for name, value in json.loads(to_json(DataConfig())).items() if name in now["data"]}
        state["data"] = defaults | state["data"]
        if mix := state["data"].get("mix"):
            state["data"]["mix"] = shares_of(mix)
        state["adapter"] = json.loads(to_json(AdapterConfig())) | state["adapter"]
        if not fresh_optimizer and not (checkpoint / OPTIMIZER).is_dir():
            raise UserError(
                f"--resume: {checkpoint} is of 0.2.0 or before, whose form of the optimizer's state is no longer read; "
                "add --fresh_optimizer: weights and place in the data go on"
            )
        for name in NEEDED:
            state[name]
        for record in state["files"].values():
            record["bytes"], record["crc32"]
        require_files(checkpoint, state["files"], fresh_optimizer)
        other = OPTIMS.get(now["optim"])
        of_optimizer = SAME_OPTIMIZER + (SAME_RANKS if other is not None and not other.by_parameter else ())
        different = [key for key in SAME + (() if fresh_optimizer else of_optimizer) if state[key] != now[key]]
    except UNREADABLE as error:
        raise UserError(
            f"{checkpoint}/{STATE} cannot be read ({told(error)}); {remedy_of(checkpoint, False)}"
        ) from error
    for key in different:
        raise UserError(
            f"--resume: the run in {checkpoint.parent.parent} has {told_difference(key, state[key], now[key])}; "
            + (
                "give the same flags, or add --fresh_optimizer: the optimizer's state cannot move, weights and data go "
                "on"
                if key in of_optimizer
                else "give the first run's flags and data, or another --proj_dir and --bone_load or its kin to train "
                "this adapter on other data"
                if key == "data"
                else "give the first run's flags, or another --proj_dir"
            )
        )
    return state


def told_difference(key: str, then: Any, now: Any) -> str:
    """Words for what differs; hashes of the data are told by what they are of."""
    then, now = differences(then, now)
    hashed = [name for name in HASHES if key == "data" and then.pop(name, None) != now.pop(name, None)]
    words = [f"{key} {then}, this command {now}"] if then else []
    others = " and ".join(HASHES[name] for name in hashed)
    return " and ".join(words + [f"data whose {others} are others than this command's"] * bool(hashed))


def differences(then: Any, now: Any) -> tuple[Any, Any]:
    """Reduce two dicts to the entries in which they differ, None for a missing one; other values stay."""
    if not isinstance(now, dict):
        return then, now
    keys = [key for key in {**now, **then} if then.get(key) != now.get(key)]
    return {key: then.get(key) for key in keys}, {key: now.get(key) for key in keys}
