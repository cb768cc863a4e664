"""Commands in a current folder that came with somebody's data, full of modules and settings that must not run."""

import os
import subprocess
import sys
from pathlib import Path

from rwkv_peft.children import python_command

ROOT = Path(__file__).resolve().parents[1]
MODEL = ("--load_model", ROOT / "demo" / "rwkv6-demo.pth", "--data_file", "data", "--ctx_len", 16)
MODEL = (*MODEL, "--accelerator", "cpu", "--val_split", 0.2, "--precision", "fp32")
RANK = ("--bone_r", 16)
# each after those before it, whose files it reads; the first training compiles its kernels
COMMANDS = (
    ("preprocess", "many.txt", "--tokenizer", "bytes", "--split", "line", "--workers", 2, "--output", "many"),
    ("preprocess", "rows.txt", "--tokenizer", "bytes", "--split", "line", "--output", "data"),
    ("train", *MODEL, *RANK, "--epoch_steps", 2, "--epoch_count", 1, "--proj_dir", "run"),
    ("train", *MODEL, *RANK, "--epoch_steps", 2, "--epoch_count", 1, "--proj_dir", "ranks", "--devices", 2),
    ("compare", "--methods", "bone", "--rank", 16, "--steps", 2, "--seeds", 1, "--output", "compared", "--", *MODEL),
    ("plot", "run", "loss.png"),
    ("plot", "run", "ranks", "both.png"),
    ("verify", ROOT / "demo" / "rwkv7-demo.pth"),
)


def run_among_traps(folder):
    """For each command: (True if it ended, the fault or "")."""
    sys.path.insert(0, str(ROOT / "tests"))
    from traps import set_traps

    folder.mkdir()
    ran = set_traps(folder)
    (folder / "many.txt").write_text("a line that becomes tokens\n" * 200_000)  # enough for several workers
    (folder / "rows.txt").write_text("a line that becomes tokens\n" * 40)
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    for words in COMMANDS:
        command = python_command("rwkv_peft", *map(str, words))
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        fault = f"{words[0]} ran a module of the current folder" if ran.exists() else ""
        if not fault and done.returncode:
            fault = f"{words[0]} ended with {done.returncode}: {done.stderr[-300:]}"
        yield done.returncode == 0, fault
