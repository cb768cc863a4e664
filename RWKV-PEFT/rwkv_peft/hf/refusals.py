"""What Hugging Face's libraries refuse, in words that say of what."""

import contextlib
from collections.abc import Iterator

from ..errors import UserError


@contextlib.contextmanager
def refusals_of(what: str) -> Iterator[None]:
    """What a library says of its arguments or files, as a UserError about `what`."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise UserError(f"{what}: {error}") from error
