"""The command that installs a missing package, chosen by the files beside this package."""

import sys
from pathlib import Path


def how_to_install(needs: str = "") -> str:
    """The remedy for a missing package; needs is a file of requirements to install besides requirements.txt, or ""."""
    root = Path(__file__).resolve().parents[2]
    remedy = "pip install -r " + " -r ".join(filter(None, ("requirements.txt", needs)))
    activate = root / ".venv" / "bin" / "activate"
    if activate.is_file() and Path(sys.prefix) != root / ".venv":
        return f"activate the environment that has it (. {activate}), or {remedy}"
    if (root / "scripts" / "setup.sh").is_file():
        return f"activate the environment that has it, make one (sh {root}/scripts/setup.sh), or {remedy}"
    return remedy
