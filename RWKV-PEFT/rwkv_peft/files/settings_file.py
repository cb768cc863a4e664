"""Settings in a file of their own beside tensors, as folders of Hugging Face's libraries have them."""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError, told


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where it is none."""
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {told(error)}; copy it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings, but a {type(settings).__name__}; copy it again")
    return settings
