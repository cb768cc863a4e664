"""A line of the doctor's report."""

from typing import NamedTuple

OK, NOTE, MISSING = "ok", "-", "MISSING"  # as it should be; good to know; training cannot run without it
INSTALL = "pip install -r requirements.txt"


class Finding(NamedTuple):
    """One line of the report: the thing that was checked, its status, a text, and the remedy or ""."""

    name: str
    status: str
    text: str
    remedy: str = ""
