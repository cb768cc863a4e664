"""The command that installs what this Python lacks, by what lies beside the package."""

import sys
from pathlib import Path


def how_to_install(needs: str = "") -> str:
    """What to do about a missing package; needs names the file of requirements that has it besides requirements.txt."""
    root = Path(__file__).resolve().parents[2]
    remedy = "pip install -r " + " -r ".join(filter(None, ("requirements.txt", needs)))
    activate = root / ".venv" / "bin" / "activate"
    if activate.is_file() and Path(sys.prefix) != root / ".venv":
        return f"activate the environment that has it (. {activate}), or {remedy}"
    if (root / "scripts" / "setup.sh").is_file():
        return f"activate the environment that has it, make one (sh {root}/scripts/setup.sh), or {remedy}"
    return remedy
