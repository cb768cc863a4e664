"""Reading .safetensors files: each way of being broken with its own words."""

from .errors import UserError
from .pth import require_file, require_weights


def read_safetensors(path):
    """({name: tensor}, the header's metadata) of a .safetensors file; the tensors are mapped.

    Raises UserError: a missing file, a folder, one that is no whole safetensors file, and as require_weights does.
    """
    from safetensors import SafetensorError, safe_open

    path = require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}; copy it again") from error
    require_weights(tensors, path)
    return tensors, metadata
