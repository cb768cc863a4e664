"""The command that installs a missing package, chosen by the files beside this package."""

import shlex
import sys
from pathlib import Path


def how_to_install(extra: str = "") -> str:
    """The remedy for a missing package of pyproject.toml's requirements, or of one of its extras."""
    root = Path(__file__).resolve().parents[3]
    script = root / "scripts" / "setup.sh"
    named = f"[{extra}]" if extra else ""
    if not script.is_file():
        return f"pip install 'rwkv-peft{named}'"
    remedy = f"install it (sh {shlex.quote(str(script))}{f' {extra}' * bool(extra)})"
    activate = root / ".venv" / "bin" / "activate"
    if activate.is_file() and Path(sys.prefix) != root / ".venv":
        return f"activate the environment that has it (. {shlex.quote(str(activate))}), or {remedy}"
    return remedy
