"""Check, before any work, that a tracker would take a run: --wandb, --trackio and --swanlab, none of them imported."""

import configparser
import importlib.util
import netrc
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlparse

from ...config import TrainConfig

OFFLINE = ("offline", "dryrun", "disabled")


class Tracker(NamedTuple):
    """A tracker's demands: `taken` is the pattern of its projects' names, and `rule` the same in words; ready() is True
    if it can log from here, with `remedy` if not; `again` is the remedy if it fails all the same."""

    taken: str
    rule: str
    again: str
    ready: Callable[[], bool] = lambda: True
    remedy: str = ""


def wandb_is_offline() -> bool:
    """True if wandb only writes to disk, by WANDB_MODE or the settings of `wandb offline`."""
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
    """True if there is a key: in the environment, or in the netrc file, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def swanlab_ready() -> bool:
    """True if SwanLab only writes to disk, or has a key: in the environment, or where `swanlab login` puts it."""
    if os.environ.get("SWANLAB_MODE") in (*OFFLINE, "local") or os.environ.get("SWANLAB_API_KEY"):
        return True
    home = os.environ.get("SWANLAB_ROOT") or os.environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab"
    return any(Path(folder, ".netrc").is_file() for folder in (".swanlab", home))


TRACKERS = MappingProxyType(
    {
        "wandb": Tracker(
            r"[^/\\#?%:]+",
            "a project's name may not contain / \\ # ? % :",
            "run `wandb login --relogin`, or set WANDB_MODE=offline",
            lambda: wandb_is_offline() or wandb_has_key(),
            "this machine is not logged in to Weights & Biases; run `wandb login` first, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to keep the numbers in --proj_dir",
        ),
        "trackio": Tracker(
            r"[\w.-]+",
            "a project's name has letters, digits, _, - and .",
            "give another project, or set TRACKIO_DIR to a folder that can be written",
        ),
        "swanlab": Tracker(
            r"[\w.+-]{1,100}",
            "a project's name has letters, digits, _, -, + and ., 100 at most",
            "run `swanlab login --relogin`, or set SWANLAB_MODE=offline",
            swanlab_ready,
            "this machine is not logged in to SwanLab; run `swanlab login` first, set SWANLAB_API_KEY, or set "
            "SWANLAB_MODE=offline to keep the numbers in --proj_dir",
        ),
    }
)


def chosen_trackers(train: TrainConfig) -> dict[str, str]:
    """The projects to log to: {tracker: project}."""
    return {name: project for name in TRACKERS if (project := getattr(train, name))}


def check_trackers(train: TrainConfig) -> Iterator[str]:
    """Yield refusals of projects that a tracker would refuse, or that need a login or a package."""
    for name, project in chosen_trackers(train).items():
        tracker = TRACKERS[name]
        if not re.fullmatch(tracker.taken, project):
            yield f"--{name} {project!r}: {tracker.rule}"
        if importlib.util.find_spec(name) is None:
            yield f"--{name} {project} needs the {name} package: pip install {name}"
        elif not tracker.ready():
            yield f"--{name} {project}: {tracker.remedy}"
