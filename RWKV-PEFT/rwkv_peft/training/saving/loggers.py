"""Log a run's numbers and config also to TensorBoard; on request to Weights & Biases, trackio, SwanLab."""

import importlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ...cli.errors import UserError, summarize
from ...cli.names import TRACKERS
from ...config import RunConfig


class Tracker(Protocol):
    """A place that numbers of steps go to."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard's files in a folder, with the run's settings. It hides earlier records of steps from `first_step` on:
    that run ended before it saved them."""

    def __init__(self, config: RunConfig, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)
        settings = {
            f"{part}/{name}": value if isinstance(value, (bool, int, float, str)) else str(value)
            for part, values in asdict(config).items()
            for name, value in (values.items() if isinstance(values, dict) else [("", values)])
        }
        self.writer.add_hparams(settings, {}, run_name=".")

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class ModuleTracker:
    """A tracker's module with init, log and finish, as wandb's has; settings are init's arguments. init connects."""

    def __init__(self, tracker: str, **settings: Any) -> None:
        self.module = importlib.import_module(tracker)
        self.module.init(**settings)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.module.log(dict(numbers), step=step)

    def close(self) -> None:
        self.module.finish()


def make_tracker(name: str, project: str, config: RunConfig, folder: Path, first_step: int) -> Tracker:
    """Connect to a tracker by its name."""
    run, settings = folder.resolve().name, {"project": project, "config": asdict(config)}
    if name == "trackio":  # a run that goes on adds to the newest one of its name
        return ModuleTracker(name, name=run, resume="allow" if first_step else "never", embed=False, **settings)
    if name == "swanlab":
        return ModuleTracker(name, experiment_name=run, log_dir=str(folder / name), **settings)
    return ModuleTracker(name, dir=str(folder), **settings)


def make_trackers(config: RunConfig, folder: Path, first_step: int) -> list[Tracker]:
    """Make the trackers of a run. They write below `folder` (trackio in a folder of its own). Raises UserError if one
    refuses its project, or cannot be reached."""
    trackers: list[Tracker] = [TensorBoard(config, folder / "tensorboard", first_step)]
    for name in TRACKERS:
        if project := getattr(config.train, name):
            try:
                trackers.append(make_tracker(name, project, config, folder, first_step))
            except Exception as error:
                again = "mend that, or leave the flag out: metrics.jsonl has the same numbers"
                raise UserError(f"--{name} {project}: {summarize(error, named=True)}; {again}") from error
    return trackers
