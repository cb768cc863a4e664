"""Check Python and the packages: what is required in which versions, and what only some features need."""

import importlib
import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from .finding import INSTALL, MISSING, NOTE, OK, Finding

PYTHONS = ((3, 10), (3, 14))
MODULES = MappingProxyType({"pyyaml": "yaml"})  # packages whose modules have other names
OPTIONAL = (
    ("rwkv-simple", "a second runtime for merged models"),
    ("transformers", "Hugging Face models"),
    ("peft", "Bone as a plug-in of Hugging Face peft"),
    ("bitsandbytes", "quantized bases, --optim adamw8bit"),
    ("lion-pytorch", "--optim lion"),
    ("schedulefree", "--optim schedule_free"),
    ("math-verify", "rwkv-peft eval math"),
    ("lm_eval", "rwkv-peft eval, tasks of the harness"),
    ("fastapi", "rwkv-peft serve"),
    ("wandb", "--wandb"),
    ("trackio", "--trackio"),
    ("swanlab", "--swanlab"),
)


class Requirement(NamedTuple):
    """A package and its bounds, e.g. ((">=", (2, 6)), ("<", (3,)))."""

    name: str
    bounds: tuple[tuple[str, tuple[int, ...]], ...]

    def admits(self, version: str) -> bool:
        """Return whether a version lies within the bounds; only its leading numbers are compared."""
        numbers = version_numbers(version)
        return all(numbers >= bound if sign == ">=" else numbers < bound for sign, bound in self.bounds)

    @property
    def spec(self) -> str:
        return ",".join(sign + ".".join(map(str, bound)) for sign, bound in self.bounds)


def version_numbers(text: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0); () if the text does not begin with a number."""
    return tuple(int(part) for part in re.split(r"[^\d.]", text, maxsplit=1)[0].split(".") if part)


def parse_requirement(line: str) -> Requirement | None:
    """A line of requirements.txt, such as "torch>=2.6,<3  # why" -> Requirement; None for a blank line, a comment, or a
    requirement of older Pythons than this one, such as 'name; python_version < "3.14"'."""
    line, _, marker = line.split("#")[0].replace(" ", "").partition(";")
    limit = re.search(r"python_version<['\"]([\d.]+)", marker)
    if not line or (limit and sys.version_info[:2] >= version_numbers(limit[1])):
        return None
    name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
    bounds = re.findall(r"(>=|<)(\d+(?:\.\d+)*)", line[len(name) :])
    return Requirement(name, tuple((sign, version_numbers(number)) for sign, number in bounds))


def requirements() -> list[Requirement]:
    """The requirements of training, from requirements.txt of the source tree, else from the installed package."""
    path = Path(__file__).resolve().parents[3] / "requirements.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        lines = [line for line in metadata.requires("rwkv-peft") or () if "extra ==" not in line]
    return [requirement for requirement in map(parse_requirement, lines) if requirement]


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


def check_package(requirement: Requirement) -> Finding:
    """Check that a required package is installed, has a fitting version, and can be imported."""
    name = requirement.name
    if not installed(name):
        return Finding(name, MISSING, "not installed", INSTALL)
    version = metadata.version(name)
    if not requirement.admits(version):
        return Finding(name, MISSING, f"{version}, and {requirement.spec} is needed", INSTALL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # a broken install may raise anything, and the user must see it
        remedy = f"pip install --force-reinstall '{name}{requirement.spec}'"
        return Finding(name, MISSING, f"{version} does not import: {type(error).__name__}: {error}", remedy)
    return Finding(name, OK, version)


def check_optional() -> Iterator[Finding]:
    """Look for packages that only some features need."""
    for name, use in OPTIONAL:
        if installed(name):
            yield Finding(name, OK, metadata.version(name))
        else:
            yield Finding(name, NOTE, f"not installed ({use})", f"pip install {name}")
