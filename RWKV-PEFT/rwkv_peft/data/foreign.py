"""Tells what a file is that is named like rows of text, and is none in UTF-8."""

from pathlib import Path

from ..errors import UserError

TO_UTF_8 = (
    "convert the file to UTF-8: Excel saves as CSV UTF-8, Notepad asks for the encoding, and in a shell `iconv -f GBK "
    "-t UTF-8 OLD > NEW` converts GBK (`-f WINDOWS-1252`: Western Europe's)"
)
UTF_16 = f"UTF-16, and UTF-8 is due; {TO_UTF_8.partition(' (`')[0].replace('GBK', 'UTF-16')}"
STARTS = (  # the first bytes of a file, what it is, and the remedy
    (b"\xff\xfe", UTF_16),
    (b"\xfe\xff", UTF_16),
    (b"PK\3\4", "a zip file, as office programs write them, whatever its name; export it as .csv or .txt"),
    (b"PAR1", "a .parquet file; name it so"),
    (b"\x1f\x8b", "compressed by gzip; name it .jsonl.gz, or unpack it"),
    (b"%PDF", "a PDF, whatever its name; export its text as .txt"),
)
BINARY = (".parquet", ".gz")


def refuse_foreign(path: Path) -> None:
    """Raise UserError for a file that is named like a text, and begins like something else."""
    with open(path, "rb") as file:
        start = file.read(4)
    for bytes_, what in STARTS:
        if start.startswith(bytes_) and path.suffix not in BINARY:
            raise UserError(f"{path} is {what}")
