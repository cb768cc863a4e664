"""The commands that install what is missing: a package, by the files beside this one, and a C++ compiler."""

import shlex
import sys
from importlib import metadata
from pathlib import Path

COMPILER = (
    "Debian, Ubuntu: apt install g++; Fedora, RHEL: dnf install gcc-c++; without root: "
    "conda install -c conda-forge gxx; macOS: xcode-select --install"
)


def how_to_install(extra: str = "") -> str:
    """The remedy for a missing package of pyproject.toml's requirements, or of one of its extras."""
    root = Path(__file__).resolve().parents[3]
    script = root / "scripts" / "setup.sh"
    if not script.is_file():  # installed from a wheel, of a name that no package index has
        return f"pip install {shlex.join(requirements_of(extra))}"
    remedy = f"install it (sh {shlex.quote(str(script))}{f' {extra}' * bool(extra)})"
    activate = root / ".venv" / "bin" / "activate"
    if activate.is_file() and Path(sys.prefix) != root / ".venv":
        return f"activate the environment that has it (. {shlex.quote(str(activate))}), or {remedy}"
    return remedy


def requirements_of(extra: str = "") -> list[str]:
    """The requirements of the installed package, or only of one of its extras."""
    pairs = [line.partition("extra ==") for line in metadata.requires("rwkv-peft") or ()]
    if not extra:
        return [line for line, with_extra, _ in pairs if not with_extra]
    return [line.partition(";")[0].strip() for line, _, name in pairs if name.strip(" \"'") == extra]
