"""Errors of Hugging Face's libraries as UserErrors."""

import contextlib
from collections.abc import Iterator

from ..cli.errors import UserError


@contextlib.contextmanager
def refusals_of(what: str) -> Iterator[None]:
    """Within, an error that a library raises about its arguments or files becomes a UserError that names `what`."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        raise UserError(*f"{what}: {error}".splitlines()) from error
