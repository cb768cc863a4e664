"""Reads a JSON file of settings, as folders of Hugging Face's libraries have beside tensors."""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError, told


def read_settings(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. Raises UserError if it holds none."""
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {told(error)}; copy it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings, but a {type(settings).__name__}; copy it again")
    return settings
