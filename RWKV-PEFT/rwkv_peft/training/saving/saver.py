"""Write a run's files, adapters or models and checkpoints that resume it bitwise; and load a checkpoint.

proj_dir/adapter-epoch-N.safetensors   the trained tensors after epoch N (--peft none: rwkv-epoch-N.pth, the model)
proj_dir/adapter.safetensors           the same, newest (--peft none: rwkv.pth)
proj_dir/adapter-best.safetensors      the same, at the lowest validation loss
proj_dir/state.pth                     tuned time states alone, under the same labels
proj_dir/checkpoints/step-NNNNNNNN/    the optimizer's state, the trained tensors, state.json

products.py writes the first four; checkpoints.py removes old saves.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...adapters.methods import adapter_parameter
from ...checkpoints.atomic import CannotWrite, fsync, telling_failures
from ...checkpoints.base import Base
from ...checkpoints.tensors import save_pth
from ...cli.errors import Diverged, UserError
from ...cli.names import all_finite
from ...config import RunConfig
from ...ops.products import row
from ..engine import TrainingEngine
from ..step.plan import Plan
from .checkpoints import (
    CHECKPOINTS,
    HIDDEN,
    OPTIMIZER,
    STATE,
    UNSAVED,
    clear_hidden,
    discard_old,
    read_state,
    record_of,
    remove,
    write_state,
)
from .optimizer_state import SavedOptimizer, write_pieces
from .products import RunProducts, keeps_all, model_dtypes, share_file


class Saver:
    """Write checkpoints and trained tensors of one run. All ranks call each of save, save_tensors, save_checkpoint and
    trained at once.

    identity goes into state.json, with the keys of SAME and SAME_OPTIMIZER (resume.py) among others. Its "base" is the
    base model's fingerprint, "" for a model that was never loaded from a file; base is the Base itself, or None.
    """

    def __init__(
        self, folder: Path, config: RunConfig, plan: Plan, identity: Mapping[str, Any], base: Base | None = None
    ) -> None:
        self.folder, self.config, self.plan, self.identity, self.base = folder, config, plan, identity, base
        self.products = RunProducts(folder, config, identity.get("base", ""), base)

    @property
    def newest(self) -> Path:
        """The file of the newest trained tensors."""
        return self.products.newest

    def save(self, engine: TrainingEngine, done: int, epoch: int | None, figures: Mapping[str, float]) -> None:
        """Save after `done` optimizer steps; `epoch` is the number of epochs done if one just ended. figures are the
        step's; the next step may read them."""
        self.save_tensors(engine, [""] if epoch is None else [f"epoch-{epoch}", ""])
        self.save_checkpoint(engine, done, figures)

    def save_tensors(self, engine: TrainingEngine, labels: Sequence[str]) -> None:
        """Write the trained tensors, named by each label: adapter-LABEL.safetensors or rwkv-LABEL.pth."""
        # Every rank takes part in gathering; one writes.
        tensors = self.trained(engine)
        if engine.rank == 0:
            self.products.write(tensors, labels)
        engine.barrier()

    def trained(self, engine: TrainingEngine) -> dict[str, torch.Tensor]:
        """{name: tensor} of the model, or of the adapter and the trained parts; {} on ranks other than 0."""
        whole, model = self.config.adapter.whole_model, engine.model
        parameters = [(name, p) for name, p in model.named_parameters() if whole or p.requires_grad]
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if adapter_parameter(name)]
        return gather([*parameters, *buffers], engine)

    def save_checkpoint(self, engine: TrainingEngine, done: int, figures: Mapping[str, float]) -> None:
        """Write the optimizer's state, the trained tensors and state.json to a folder, hidden until it is complete."""
        hidden, leads = self.folder / CHECKPOINTS / f"{HIDDEN}{done:08d}", engine.rank == 0
        if leads:
            with self.writing(hidden):
                clear_hidden(self.folder)
                (hidden / OPTIMIZER).mkdir(parents=True)
        # Not before the folder is there: the ranks of other nodes see it on a shared disk.
        engine.barrier()
        with self.writing(hidden):
            write_pieces(hidden, engine.rank, engine.pieces(), engine.steps_taken, engine.codes(), engine.counters())
        # Not before the pieces of all ranks are on the disk: state.json lists them.
        engine.barrier()
        # a file in the base's dtype may hold less than what trains; --fresh_optimizer goes on from the exact weights
        exact_file = not self.config.adapter.whole_model or keeps_all(self.config, self.base)
        exact = {} if exact_file else self.trained(engine)
        if not leads:
            return
        state = {
            "step": done,
            "epoch": done // self.plan.epoch_steps,
            "samples_seen": self.plan.samples_seen(done),
            "step_samples": self.plan.step_samples,
            "trained": trained_names(engine),
            "figures": figures,
            "config": asdict(self.config),
            "products": row().recorded(),
            **self.identity,
        }
        if not engine.is_by_parameter:
            state["groups"] = engine.group_names
        with self.writing(hidden):
            self.complete(hidden, state, exact)
            discard_old(self.folder, self.config.train.keep_checkpoints)

    def complete(self, hidden: Path, state: dict[str, Any], exact: Mapping[str, torch.Tensor]) -> None:
        """Add the trained tensors (`exact`, or the newest file) and state.json to a checkpoint; give it its name."""
        if exact:
            order = model_dtypes(self.config, self.base)
            save_pth(hidden / self.newest.name, {key: exact[key] for key in order})
        else:
            share_file(self.newest, hidden / self.newest.name)
        state["files"] = {
            str(path.relative_to(hidden)): record_of(path)
            for path in (*sorted(hidden.iterdir()), *sorted((hidden / OPTIMIZER).iterdir()))
            if path.is_file()
        }
        write_state(hidden / STATE, state)
        for path in (*hidden.rglob("*"), hidden):  # all is on the disk before the folder gets its name
            fsync(path)
        final = hidden.with_name(hidden.name.removeprefix("."))
        if (final / STATE).exists():  # from before a resume, with smaller steps: it stays until this one is there
            final = final.with_name(f"{final.name}-{state['samples_seen']}")
        if final.exists():
            remove(final)
        # The one moment at which the checkpoint appears, whole. A killed run leaves a hidden folder, which is cleared.
        hidden.rename(final)
        fsync(final.parent)
        (self.folder / UNSAVED).unlink(missing_ok=True)

    @contextmanager
    def writing(self, hidden: Path) -> Iterator[None]:
        """Turn the system's refusal to write a checkpoint into CannotWrite; remove its beginning.

        The trained tensors of a run that cannot save its first checkpoint are still of use, so the mark UNSAVED goes
        and no later run clears them away.
        """
        try:
            with telling_failures(hidden, f"the trained tensors are in {self.products.newest}"):
                yield
        except CannotWrite:
            (self.folder / UNSAVED).unlink(missing_ok=True)
            if self.identity.get("world_size") == 1:  # of several, others may still be writing into it
                shutil.rmtree(hidden, ignore_errors=True)
            raise


def gather(pairs: Iterable[tuple[str, torch.Tensor]], engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """Gather (name, parameter or buffer) pairs -> {name: tensor on the CPU}, one by one under ZeRO-3; {} on ranks other
    than 0. Raises Diverged, on all ranks, for a tensor that is not finite, before anything is written."""
    tensors = {}
    for name, tensor in pairs:
        # One at a time: ZeRO-3 gathers it for this block alone. The check is on every rank, so that all end together.
        with engine.whole(tensor):
            if not all_finite(tensor):
                raise Diverged(f"{name} is no longer finite")
            if engine.rank == 0:
                tensors[name] = tensor.detach().to("cpu", copy=True)
    return tensors


def trained_names(engine: TrainingEngine) -> list[str]:
    """The names of the parameters that train: those in a checkpoint."""
    return sorted(name for names in engine.group_names for name in names)


def load_checkpoint(engine: TrainingEngine, checkpoint: Path) -> None:
    """Restore weights and the optimizer's state into an engine, on all ranks; the optimizer's settings come from
    this run's flags.

    Frozen parameters come from the base. The list in state.json shows that nothing else is missing. Raises UserError if
    this run trains other parameters, or in other groups if the state is kept by ranks.
    """
    state = read_state(checkpoint)
    before, now = state["trained"], trained_names(engine)
    if before != now:
        different = sorted({*map(str, before)} ^ {*now}) or ["their order"]
        raise UserError(
            f"--resume: {checkpoint} and this run train different parameters ({different[0]} and "
            f"{len(different) - 1} more); give the first run's flags"
        )
    engine.compute.figures = state.get("figures", {})  # earlier versions wrote none
    if not engine.is_by_parameter and state["groups"] != engine.group_names:
        raise UserError(
            f"--resume: {checkpoint} holds the optimizer's state by other groups of parameters than this run's; "
            "give the first run's flags, or add --fresh_optimizer: weights and place in the data go on"
        )
    saved = SavedOptimizer(checkpoint)
    # In place: pieces are views of the masters and of the moments.
    for piece in engine.pieces():
        saved.fill(piece)
    saved.fill_codes(engine.rank, engine.codes())
    engine.set_counters(saved.scale)
    engine.go_on(saved.steps)
