"""Prints a workbook as lines of JSON, in a process that a hostile file may end.

The first line has the names of its sheets, the others the rows of the first, as lists of cells.

python -m rwkv_peft.data.workbook FILE BYTES    with at most BYTES of memory
"""

import json
import sys


def main(path: str, memory: str) -> None:
    """Print the lines of a workbook."""
    from python_calamine import CalamineWorkbook

    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    book = CalamineWorkbook.from_path(path)
    print(json.dumps(book.sheet_names))
    for row in book.get_sheet_by_index(0).iter_rows():
        print(json.dumps(row, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
