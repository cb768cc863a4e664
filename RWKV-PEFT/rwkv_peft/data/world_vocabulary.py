"""Reads the file of a World vocabulary: a line "id 'token' length" for each token, the token as Python writes it."""

import ast
import re
from pathlib import Path

from ..cli.errors import UserError

MOST = 1 << 26  # bytes of a file
# one str or bytes literal, as a World vocabulary has them; any other expression could ask for any memory
LITERAL = re.compile(r"""b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")


def parse_world_vocabulary(path: Path) -> list[bytes | None]:
    """Read a World vocabulary -> list of bytes or None by token id. Raises UserError that names the bad line."""
    table: list[bytes | None] = [None]
    if (size := path.stat().st_size) > MOST:
        raise UserError(f"{path} has {size:,} bytes, and a World vocabulary about a million; name another file")
    content = path.read_bytes()
    most = max(65536, len(content))  # a bound for the table, which grows with the ids; a line takes more than a byte
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n"), start=1):
        line = line.rstrip("\r")
        if not line:
            continue
        head, _, rest = line.partition(" ")
        literal, _, length = rest.rpartition(" ")
        try:
            if not LITERAL.fullmatch(literal):
                raise ValueError
            token, value, size = int(head), ast.literal_eval(literal), int(length)
            value = value.encode("utf-8") if isinstance(value, str) else value
        except (ValueError, SyntaxError):
            raise UserError(
                f"{path}, line {number}: {line[:60]!r} is not \"id 'token' length\"; "
                "give a World vocabulary such as rwkv_vocab_v20230424.txt"
            ) from None
        if not 0 < token < most:
            raise UserError(
                f"{path}, line {number}: token {token}, and ids of a file of {len(content):,} bytes are from 1 to "
                f"{most - 1:,}; give a World vocabulary such as rwkv_vocab_v20230424.txt"
            )
        if len(value) != size:
            raise UserError(
                f"{path}, line {number}: token {token} has {len(value)} bytes, and the line "
                f"says {size}; the file is damaged, download it again"
            )
        table.extend([None] * (token + 1 - len(table)))
        table[token] = value
    if len(table) == 1:
        raise UserError(f"{path}: holds no token; give a World vocabulary such as rwkv_vocab_v20230424.txt")
    return table
