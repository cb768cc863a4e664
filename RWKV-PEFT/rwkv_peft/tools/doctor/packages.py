"""Check Python and the packages: what is required in which versions, and what only some features need."""

import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from ...cli.errors import told

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OK, NOTE, MISSING = "ok", "-", "MISSING"  # as it should be; good to know; training cannot run without it
INSTALL = "pip install -r requirements.txt"
PYTHONS = ((3, 10), (3, 14))
MODULES = MappingProxyType({"pyyaml": "yaml"})  # packages whose modules have other names
OPTIONAL = (
    ("transformers", "Hugging Face models"),
    ("peft", "Bone as a plug-in of Hugging Face peft"),
    ("bitsandbytes", "quantized bases, --optim adamw8bit"),
    ("lion-pytorch", "--optim lion"),
    ("schedulefree", "--optim schedule_free"),
    ("math-verify", "train.py --reward math"),
    ("lm_eval", "rwkv-peft eval, tasks of the harness"),
    ("fastapi", "rwkv-peft serve"),
    ("wandb", "--wandb"),
    ("trackio", "--trackio"),
    ("swanlab", "--swanlab"),
)


class Finding(NamedTuple):
    """One line of the report: the thing that was checked, its status, a text, and the remedy or ""."""

    name: str
    status: str
    text: str
    remedy: str = ""


def requirements() -> "list[Requirement]":
    """The requirements of training on this Python, from requirements.txt of the source tree, else from the installed
    package."""
    from packaging.requirements import Requirement  # which an environment has that has torch

    path = Path(__file__).resolve().parents[4] / "requirements.txt"
    if path.is_file():
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        lines = [line for line in metadata.requires("rwkv-peft") or () if "extra ==" not in line]
    found = [Requirement(line) for line in lines if line]
    return [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate()]


def check_python() -> list[Finding]:
    """Check that the dependencies have wheels for this version of Python."""
    version = sys.version.split()[0]
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return [Finding("python", OK, f"{version}, {sys.executable}")]
    remedy = f"python3.13 -m venv .venv && . .venv/bin/activate && {INSTALL}"
    return [Finding("python", MISSING, f"{version}, and 3.10 to 3.14 is needed", remedy)]


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_package(requirement: "Requirement") -> Finding:
    """Check that a required package is installed, has a fitting version, and can be imported."""
    name = requirement.name
    if not installed(name):
        return Finding(name, MISSING, "not installed", INSTALL)
    version = metadata.version(name)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, MISSING, f"{version}, and {requirement.specifier} is needed", INSTALL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # a broken install may raise anything, and the user must see it
        remedy = f"pip install --force-reinstall '{name}{requirement.specifier}'"
        return Finding(name, MISSING, f"{version} does not import: {told(error, named=True)}", remedy)
    return Finding(name, OK, version)


def check_optional() -> Iterator[Finding]:
    """Look for packages that only some features need."""
    for name, use in OPTIONAL:
        if installed(name):
            yield Finding(name, OK, metadata.version(name))
        else:
            yield Finding(name, NOTE, f"not installed ({use})", f"pip install {name}")
