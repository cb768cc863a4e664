"""Log a run's numbers and config also to TensorBoard, and on request to Weights & Biases, trackio, SwanLab."""

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from ...cli.errors import UserError, summarize
from ...cli.names import TRACKERS
from ...config import RunConfig


class ModuleLogger(Logger):
    """Logs to a tracker's module with init, log and finish, as wandb's has; settings are init's arguments."""

    def __init__(self, tracker: str, **settings: Any) -> None:
        super().__init__()
        self.tracker, self.module = tracker, importlib.import_module(tracker)
        self.module.init(**settings)

    @property
    def name(self) -> str:
        return self.tracker

    @property
    def version(self) -> None:
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.module.log(dict(metrics), step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because init has them."""

    def finalize(self, status: str) -> None:
        self.module.finish()


class Board(TensorBoardLogger):
    """Logs to TensorBoard, without Lightning's hparams.yaml: config.json beside it has the same."""

    def save(self) -> None:
        self.experiment.flush()


def make_tracker(name: str, project: str, config: RunConfig, folder: Path, first_step: int) -> Logger:
    """Make the logger of a tracker, which connects."""
    run = folder.resolve().name
    if name == "trackio":  # a run that goes on adds to the newest one of its name
        resume = "allow" if first_step else "never"
        return ModuleLogger(name, project=project, name=run, config=asdict(config), resume=resume, embed=False)
    if name == "swanlab":
        files = str(folder / name)
        return ModuleLogger(name, project=project, experiment_name=run, config=asdict(config), log_dir=files)
    logger = WandbLogger(project=project, save_dir=folder)
    _ = logger.experiment  # the first use connects
    return logger


def make_loggers(config: RunConfig, folder: Path, first_step: int) -> list[Logger]:
    """Make Lightning's loggers, which write below `folder` (trackio in a folder of its own), and log the RunConfig.
    TensorBoard hides earlier records of steps from `first_step` on: that run ended before it saved them. Raises
    UserError if a tracker refuses its project, or cannot be reached."""
    loggers: list[Logger] = [Board(folder, name="", version="tensorboard", purge_step=first_step)]
    for name in TRACKERS:
        if project := getattr(config.train, name):
            try:
                loggers.append(make_tracker(name, project, config, folder, first_step))
            except Exception as error:
                again = "mend that, or leave the flag out: metrics.jsonl has the same numbers"
                raise UserError(f"--{name} {project}: {summarize(error, named=True)}; {again}") from error
    for logger in loggers:
        logger.log_hyperparams(asdict(config))
    return loggers
