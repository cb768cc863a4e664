"""`rwkv-peft demo`: a tiny base, and rows that it learns in half a minute.

rwkv-peft demo FOLDER
"""

import json
import runpy
from pathlib import Path
from types import MappingProxyType

from ..checkpoints.atomic import atomic_write
from ..cli.parser import Parser

SOURCE = Path(__file__).parents[1] / "demo"  # a link in a clone, a folder in an installed package
BASE, ROWS = "rwkv7-demo.pth", "demo-chats.jsonl"
CHATS = 300
FLAGS = MappingProxyType(  # of train.py, which suit both files
    {
        "tokenizer": "bytes",
        "precision": "fp32",
        "ctx_len": "256",
        "micro_bsz": "8",
        "epoch_count": "4",
        "lr_init": "3e-3",
    }
)


def main(argv: list[str]) -> int:
    """Write the files that are not there yet; -> the exit code."""
    parser = Parser(
        prog="rwkv-peft demo",
        description=f"Write {BASE}, an RWKV-7 of 0.8 million parameters, and {ROWS}, {CHATS} short chats, into a "
        "folder. Files that are there stay as they are.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder, which is made if it is missing")
    folder = Path(parser.parse_args(argv).folder)
    rows = runpy.run_path(str(SOURCE / "task.py"))["documents"]("chats", CHATS, 1)
    contents = {BASE: (SOURCE / BASE).read_bytes(), ROWS: "".join(f"{json.dumps(row)}\n" for row in rows).encode()}
    for name, content in contents.items():
        if not (folder / name).exists():
            with atomic_write(folder / name) as temporary:
                temporary.write_bytes(content)
        print(folder / name)
    flags = " ".join(f"--{flag} {value}" for flag, value in FLAGS.items())
    print(f"rwkv-peft train --load_model {folder / BASE} --data_file {folder / ROWS} --data_type sft {flags}")
    return 0


def settings() -> dict[str, str]:
    """The flags of train.py by name for the demo in the current folder."""
    return {"load_model": BASE, "data_file": ROWS, "data_type": "sft"} | FLAGS
