"""Hostile folders for faults.py: those of runs, adapters and comparisons that somebody else made."""

import functools
import json
import os
import random
import shutil
import sys
from pathlib import Path

import torch
from fault_attacks import Attack
from fault_files import BASE, COMPARED, RUN
from fault_processes import started
from fault_training import import_libraries, run_command, wait

from rwkv_peft.compare.plan import Cell
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.files.adapter_file import save_adapter
from rwkv_peft.files.adapters import read_adapter
from rwkv_peft.files.base import save_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from compare import test_compare  # noqa: E402
from conftest import make_tiny_state  # noqa: E402
from training.test_run_folder import PLACES  # noqa: E402

CELL = Cell("bone", -6, 7)


def prepare(folder):
    """A base, data, rows, a run of one epoch that can go on, and a complete comparison."""
    import_libraries()
    folder.mkdir()
    save_model(folder / "base.pth", make_tiny_state(vocab_size=257))
    with ShardWriter(folder / "data", vocab_size=257) as writer:
        for first in range(40):
            writer.add([1 + (first + 7 * i) % 79 for i in range(50 + first)] + [0])
    (folder / "rows.jsonl").write_text('{"question": "How many?", "answer": "#### 8"}\n')
    for rate, loss in ((-7, 2.0), (-6, 1.0), (-5, 2.0)):  # and so the best has neighbours, and nothing is due
        test_compare.keep(folder / "compared", CELL._replace(rate=rate), loss)
    for words in ((*RUN[:-4], "--epoch_count", 1), (*COMPARED, "base.pth")):
        assert wait(started(run_in, folder, words)) == 0, (folder.parent / "said").read_text()


def run_in(folder, words):
    os.chdir(folder)
    return run_command([str(word) for word in words], folder.parent / "said", {})


def at(place, kind, folder):
    """A run whose folder has something at a place where a run reads or writes."""
    (folder / "outside").write_text('{"step": 0, "samples": 1}')
    path = folder / "run" / ("checkpoints/" + place if place.startswith(".step") else place)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else folder / "outside")
    return RUN


def named(name, folder):
    (folder / "run").rename(folder / name)
    return [name if word == "run" else word for word in RUN]


def folders_of_runs():
    told = "is a (pipe|link): a run reads and writes nothing but files"
    attacks = [
        Attack(f"{kind} at {place}", functools.partial(at, place, kind), told)
        for place in PLACES
        for kind in ("a link", "a pipe", "a device")
    ]
    patterns = ("[ab]", "a*?b[", "?", "[!a]", "**", "{a,b}", "$HOME", "%(a)s", "ü", "a b\n")
    return attacks + [
        Attack(f"a run named {name!r}", functools.partial(named, name), "resuming after step 4", 0) for name in patterns
    ]


def edited(seed, number, folder):
    """A run whose state.json has one bit of one byte changed, such that it says something else."""
    path = next(folder.glob("run/checkpoints/*/state.json"))
    content, rng = path.read_bytes(), random.Random(f"{seed} {number}")
    while True:
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        try:
            if json.loads(changed) == json.loads(content):
                continue
        except ValueError:
            pass
        path.write_bytes(changed)
        return RUN


def edits(seed, count):
    return [Attack(f"edit {number}", functools.partial(edited, seed, number), "state.json") for number in range(count)]


def converted(output, folder):
    return ("convert", "run", output, "--to", "lora", *BASE)


def of_two_adapters(words, folder):
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["key"]}
    (folder / "run" / "adapter_config.json").write_text(json.dumps(settings))
    return words


def too_large(folder):
    adapter = read_adapter(folder / "run")
    tensors = {key: torch.full_like(tensor, 3e38) for key, tensor in adapter.tensors.items()}
    save_adapter(folder / "large.safetensors", tensors, adapter.metadata)
    return ("convert", "large.safetensors", "out", "--to", "lora", *BASE)


def adapters():
    attacks = [
        Attack(f"convert run {output} --to lora", functools.partial(converted, output), "is inside the input")
        for output in ("run", "run/lora", "run/a.pth", "./run/../run")
    ]
    readers = {
        "merge": ("merge", *BASE, "--bone_checkpoint", "run", "--output", "out.pth"),
        "convert": ("convert", "run", "out.pth"),
        "generate": ("generate", "--model", "base.pth", "--tokenizer", "bytes", "--prompt", "a", "--adapter", "run"),
        "check": ("check", *BASE, "--bone_checkpoint", "run", "--merged", "base.pth"),
    }
    attacks += [
        Attack(f"two adapters, {name}", functools.partial(of_two_adapters, words), "holds two adapters")
        for name, words in readers.items()
    ]
    return attacks + [Attack("a change of 3e38", too_large, "its change is too large for float32")]


def damaged(name, content, folder):
    """A comparison that is complete, but for a file."""
    run = folder / "compared" / "runs" / CELL.folder
    path = folder / "compared" / name if name == "compare.json" else run / name
    if content in (os.mkfifo, os.mkdir):
        path.unlink()
        content(path)
    else:
        path.write_bytes(content)
    return (*COMPARED, "base.pth")


def comparisons():
    contents = [*test_compare.DAMAGED]
    for name in ("result.json", "metrics.jsonl", "compare.json"):
        contents += [(name, make, "is (a pipe|a folder|no file)") for make in (os.mkfifo, os.mkdir)]
    return [
        Attack(f"{name}, {number}", functools.partial(damaged, name, content), told)
        for number, (name, content, told) in enumerate(contents)
    ]
