"""Log the numbers of a run besides metrics.jsonl: to TensorBoard, and on request to Weights & Biases, each with the
whole config."""

import configparser
import importlib.util
import netrc
import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ...config import RunConfig
from ...errors import UserError

OFFLINE = ("offline", "dryrun", "disabled")


def check_wandb(project: str) -> Iterator[str]:
    """Yield refusals, before any work, of a project that Weights & Biases would refuse or ask a login for."""
    if re.search(r"[/\\#?%:]", project):
        yield f"--wandb {project!r} is a project name and may not contain / \\ # ? % :"
    if importlib.util.find_spec("wandb") is None:
        yield f"--wandb {project} needs the wandb package: pip install wandb"
    elif not (wandb_is_offline() or wandb_has_key()):
        yield (
            f"--wandb {project}: this machine is not logged in to Weights & Biases; run `wandb login` first, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline to keep the numbers in --proj_dir"
        )


def wandb_is_offline() -> bool:
    """Tell whether wandb only writes to disk, by WANDB_MODE or the settings of `wandb offline`."""
    mode = os.environ.get("WANDB_MODE")
    if mode is not None:
        return mode in OFFLINE
    settings = configparser.ConfigParser(interpolation=None, default_section="none")
    folders = (Path.home() / ".config" / "wandb", Path(os.environ.get("WANDB_DIR", ".")) / "wandb")
    try:
        settings.read(folder / "settings" for folder in folders)
    except configparser.Error:
        return False
    return settings.get("default", "mode", fallback="") in OFFLINE


def wandb_has_key() -> bool:
    """Tell whether there is a key: in the environment, or in the netrc file, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def make_loggers(config: RunConfig, folder: Path, first_step: int) -> list[Any]:
    """Make Lightning's loggers, which write below `folder`, and log the RunConfig. TensorBoard no longer shows what it
    has of steps from `first_step` on: that run ended before it saved them."""
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    loggers = [TensorBoardLogger(folder, name="", version="tensorboard", purge_step=first_step)]
    if project := config.train.wandb:
        logger = WandbLogger(project=project, save_dir=folder)
        try:
            _ = logger.experiment  # the first use connects
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"--wandb {project}: {words}; run `wandb login --relogin`, or set WANDB_MODE=offline"
            ) from error
        loggers.append(logger)
    for logger in loggers:
        logger.log_hyperparams(asdict(config))
    return loggers
