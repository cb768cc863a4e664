"""What a run leaves on disk: adapter or model files, and checkpoints that resume it bitwise.

proj_dir/adapter-epoch-N.safetensors   the trained tensors after epoch N (--peft none: rwkv-epoch-N.pth, the model)
proj_dir/adapter.safetensors           the same, newest (--peft none: rwkv.pth)
proj_dir/adapter-best.safetensors      the same, at the lowest validation loss
proj_dir/state.pth                     tuned time states alone, under the same labels
proj_dir/checkpoints/step-NNNNNNNN/    optimizer state, the trained tensors, state.json

products.py writes the first four; keeping.py says how many of them stay.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.methods import adapter_parameter
from ..config import AdapterConfig, RunConfig, to_json
from ..data.batches import collate
from ..data.samples import Samples
from ..errors import UserError, told
from ..files.atomic import atomic_write, fsync_folder, write_failure
from ..files.base import Base, save_model
from .checkpoints import UNREADABLE, UNSAVED, find_checkpoint, how_to_go_on
from .keeping import HIDDEN, clear_hidden, discard_old, remove
from .loading import grouped_names, trained_names
from .meeting import is_of_connection
from .plan import Plan
from .products import Products, keeps_all, model_dtypes, share_file
from .saved_files import TAG, check_records, record_of, require_files

if TYPE_CHECKING:
    from .lit import Lit

HASHED = 64  # samples that tell one data set from another
SAME = ("adapter", "base", "data")  # what a resumed run must share with the first,
SAME_OPTIMIZER = ("strategy", "world_size", "precision")  # and what its optimizer state needs besides

# what state.json must hold, each of which kind
KINDS = (
    ("samples_seen", int),
    ("trained", list),
    ("files", dict),
    ("adapter", dict),
    ("base", str),
    ("data", dict),
    ("strategy", str),
    ("world_size", int),
    ("precision", str),
    ("validated_from", int),
)


def data_identity(config: RunConfig, samples: Samples) -> dict[str, Any]:
    """What the place in the data is counted in: the settings that choose and order samples, how many there are, and
    hashes of a few of them and of what counts of these, which stand for the files, wherever they lie."""
    settings = {
        name: value for name, value in asdict(config.data).items() if name not in ("path", "tokenizer", "micro_bsz")
    }
    if config.data.dataload == "pad":  # the order of whose samples depends on this (data/samples.py)
        settings["rows_share_batches"] = config.data.micro_bsz > 1
    if config.train.val_seed is not None:
        settings["val_seed"] = config.train.val_seed
    content, counted = hashlib.sha256(), hashlib.sha256()
    for n in range(0, len(samples), -(-len(samples) // HASHED)):
        sample = collate([samples[n]])
        content.update(sample["tokens"].numpy().tobytes())
        counted.update(sample["mask"].numpy().tobytes())
    hashes = {"content": content.hexdigest()[:16], "counted": counted.hexdigest()[:16]}
    return settings | {"val_split": config.train.val_split, "samples": len(samples)} | hashes


def read_run_state(checkpoint: Path, now: Mapping[str, Any], fresh_optimizer: bool = False) -> dict[str, Any]:
    """state.json of a checkpoint, compared with what the resuming run says of itself (a dict of SAME, SAME_OPTIMIZER),
    and its other files with the sizes in it."""
    older = f"delete {checkpoint} to resume from an older checkpoint"
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        # earlier versions recorded neither sizes nor data, nor where validation on other data had begun
        state = {"files": {}, "data": json.loads(json.dumps(now["data"])), "validated_from": 0} | state
        for key, kind in KINDS:
            if not isinstance(state[key], kind) or state[key] is True:
                raise ValueError(f"{key} is a {type(state[key]).__name__}")
        check_records(state["files"])
    except UNREADABLE as error:
        raise UserError(f"{checkpoint}/state.json cannot be read ({told(error)}); {older}") from error
    require_files(checkpoint, state["files"], fresh_optimizer)
    now = json.loads(json.dumps(now))
    # a setting that the saved run did not know had its default; what counts, earlier versions did not record
    state["data"] = {"counted": now["data"]["counted"]} | state["data"]
    state["adapter"] = json.loads(to_json(AdapterConfig())) | state["adapter"]
    for key in SAME + (() if fresh_optimizer else SAME_OPTIMIZER):
        if state[key] != now[key]:
            then, today = differences(state[key], now[key])
            raise UserError(
                f"--resume: the run in {checkpoint.parent.parent} has {key} {then}, this command {today}; "
                + (
                    "give the same flags, or add --fresh_optimizer: the optimizer's state cannot move, weights and "
                    "data go on"
                    if key in SAME_OPTIMIZER
                    else "give the first run's flags and data, or another --proj_dir and --bone_load or its kin to "
                    "train this adapter on other data"
                    if key == "data"
                    else "give the first run's flags, or another --proj_dir"
                )
            )
    return state


def differences(then: Any, now: Any) -> tuple[Any, Any]:
    """The entries in which two dicts differ, of each, None for one that is not there; other values as they are."""
    if not isinstance(now, dict):
        return then, now
    keys = [key for key in {**now, **then} if then.get(key) != now.get(key)]
    return {key: then.get(key) for key in keys}, {key: now.get(key) for key in keys}


class Saver:
    """Writes checkpoints and trained tensors of one run; every method is called on all ranks at once.

    identity is the dict of SAME and SAME_OPTIMIZER keys; its "base" is the base model's fingerprint, "" for a model
    that was never loaded from a file; base is the Base itself, or None.
    """

    def __init__(
        self, folder: Path, config: RunConfig, plan: Plan, identity: Mapping[str, Any], base: Base | None = None
    ) -> None:
        self.folder, self.config, self.plan, self.identity, self.base = folder, config, plan, identity, base
        self.products = Products(folder, config, identity.get("base", ""), base)

    @property
    def newest(self) -> Path:
        """The file of the newest trained tensors."""
        return self.products.newest

    def save(self, trainer: Any, lit: "Lit", done: int, epoch: int | None = None) -> None:
        """Save after `done` optimizer steps; `epoch` is the number of epochs done where one just ended."""
        self.save_tensors(trainer, lit, [""] if epoch is None else [f"epoch-{epoch}", ""])
        self.save_checkpoint(trainer, lit, done)

    def save_tensors(self, trainer: Any, lit: "Lit", labels: Sequence[str]) -> None:
        """Write what was trained once for each label: adapter-LABEL.safetensors, or rwkv-LABEL.pth (--peft none)."""
        tensors = self.trained(trainer, lit)
        if trainer.is_global_zero:
            self.products.write(tensors, labels)
        trainer.strategy.barrier()

    @property
    def full(self) -> bool:
        """Whether what is saved is a model."""
        return self.config.adapter.whole_model

    def trained(self, trainer: Any, lit: "Lit") -> dict[str, torch.Tensor]:
        """{name: tensor} of what the run saves, as it trains: the model, or the adapter and the parts that train along.
        {} on other ranks than the first."""
        parameters = [(name, p) for name, p in lit.model.named_parameters() if self.full or p.requires_grad]
        buffers = [(name, buffer) for name, buffer in lit.model.named_buffers() if adapter_parameter(name)]
        return gather([*parameters, *buffers], trainer.strategy.zero_stage_3, trainer.is_global_zero)

    def save_checkpoint(self, trainer: Any, lit: "Lit", done: int) -> None:
        """DeepSpeed's state and state.json into a hidden folder, which gets its name when it is complete."""
        hidden = self.folder / "checkpoints" / f"{HIDDEN}{done:08d}"
        if trainer.is_global_zero:
            with self.telling(hidden):
                clear_hidden(self.folder)
                hidden.mkdir(parents=True)
        trainer.strategy.barrier()
        with self.telling(hidden):
            trainer.strategy.deepspeed_engine.save_checkpoint(
                hidden, tag=TAG, client_state={}, save_latest=False, exclude_frozen_parameters=True
            )
        trainer.strategy.barrier()
        # a file of the base's dtype may hold less than what trains, and --fresh_optimizer goes on from the weights
        exact = {} if not self.full or keeps_all(self.config, self.base) else self.trained(trainer, lit)
        if not trainer.is_global_zero:
            return
        state = {
            "step": done,
            "epoch": done // self.plan.epoch_steps,
            "samples_seen": self.plan.samples_seen(done),
            "trained": trained_names(lit),
            "groups": grouped_names(lit),
            "config": asdict(self.config),
            **self.identity,
        }
        with self.telling(hidden):
            self.complete(hidden, state, exact)
            discard_old(self.folder, self.config.train.keep_checkpoints)

    def complete(self, hidden: Path, state: dict[str, Any], exact: Mapping[str, torch.Tensor]) -> None:
        """Add to a checkpoint what DeepSpeed does not write, its trained tensors (`exact`, or the newest file) and
        state.json, and give it its name."""
        if exact:
            order = model_dtypes(self.config, self.base)
            save_model(hidden / self.newest.name, {key: exact[key] for key in order})
        else:
            share_file(self.newest, hidden / self.newest.name)
        state["files"] = {
            str(path.relative_to(hidden)): record_of(path)
            for path in (hidden / self.newest.name, *sorted((hidden / TAG).rglob("*")))
            if path.is_file()
        }
        with atomic_write(hidden / "state.json") as temporary:
            temporary.write_text(json.dumps(state, indent=1))
        sync_files(hidden)
        final = hidden.with_name(hidden.name.removeprefix("."))
        if (final / "state.json").exists():  # of a run whose steps were smaller, which goes once this one is there
            final = final.with_name(f"{final.name}-{state['samples_seen']}")
        if final.exists():
            remove(final)
        hidden.rename(final)
        fsync_folder(final.parent)
        (self.folder / UNSAVED).unlink(missing_ok=True)

    @contextmanager
    def telling(self, hidden: Path) -> Iterator[None]:
        """Make a UserError of what the system refuses while a checkpoint is written. What a run leaves that could not
        save its first one is of use, the trained tensors, and no later run clears it away."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch's word for a disk that refuses is a RuntimeError
            if is_of_connection(error):
                raise
            (self.folder / UNSAVED).unlink(missing_ok=True)
            if self.identity.get("world_size") == 1:  # other ranks may still be writing into it
                shutil.rmtree(hidden, ignore_errors=True)
            reason = write_failure(error, hidden) or f"is the disk full? {error}"
            left = "no checkpoint had been saved yet that --resume could go on from"
            if find_checkpoint(self.folder):
                left = how_to_go_on(self.folder)
            raise UserError(
                f"cannot write {hidden}: {reason}; the trained tensors are in {self.newest}; {left}"
            ) from error


def sync_files(folder: Path) -> None:
    """Force all below `folder` to disk, so that its rename cannot outrun them."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            fsync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def gather(pairs: Iterable[tuple[str, torch.Tensor]], zero_stage_3: bool, keep: bool) -> dict[str, torch.Tensor]:
    """(name, parameter or buffer) pairs -> {name: tensor on the CPU}, gathered one by one under ZeRO-3; {} on ranks
    that do not keep. Raises Diverged, on all ranks, for a tensor that is not finite, before anything is written."""
    import deepspeed

    from .lit import Diverged

    tensors = {}
    for name, tensor in pairs:
        partitioned = zero_stage_3 and isinstance(tensor, torch.nn.Parameter)
        with deepspeed.zero.GatheredParameters([tensor]) if partitioned else nullcontext():
            if not torch.isfinite(tensor).all():
                raise Diverged(f"{name} is no longer finite")
            if keep:
                tensors[name] = tensor.detach().to("cpu", copy=True)
    return tensors
