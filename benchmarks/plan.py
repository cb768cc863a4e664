"""Compares `rwkv-peft plan` with the memory of runs; and makes its table of official sizes.

    python benchmarks/plan.py measure --folder out/plan            (15 runs on the CPU, two steps each; 8 GB of disk)
    python benchmarks/plan.py measure --only full                  (the strategies on one and two ranks)
    python benchmarks/plan.py table                                (memory by size, method and quantization on a GPU)

A measured peak is the largest resident size of train.py, of its largest rank (getrusage's ru_maxrss), including the
pages of the base's file that it has read; models are random, and of an official shape if their name says so. --quick
measures a small model.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, Parser, head, row, write_tokens

from rwkv_peft.config import STRATEGIES
from rwkv_peft.models import family_named
from rwkv_peft.tools.plan.command import estimate_of, largest_rows, parse_flags, usable
from rwkv_peft.training.estimate.memory import CPU, GPU, peak

VOCABULARY = 65536
SMALL = "x060", 12, 768
FULL = "--ctx_len 64 --precision bf16 --peft none --micro_bsz 2 --strategy"
# name: version, layers, channels, dtype of the file, flags
RUNS = {
    "RWKV-6 1.6B, bat-in, bf16, 1 x 128": ("x060", 24, 2048, "bfloat16", "--ctx_len 128"),
    "RWKV-6 0.2B, bone, fp32, 1 x 512": (*SMALL, "float32", "--ctx_len 512 --precision fp32 --bone_mode bone"),
    "RWKV-6 0.2B, none, bf16, 1 x 512": (*SMALL, "bfloat16", "--ctx_len 512 --peft none"),
    "RWKV-6 0.2B, lora, bf16, 2 x 512, --grad_cp 1": (
        *(*SMALL, "bfloat16"),
        "--ctx_len 512 --micro_bsz 2 --peft lora --grad_cp 1",
    ),
    "RWKV-7 0.2B, bat-in, bf16, 1 x 512": ("x070", 12, 768, "bfloat16", "--ctx_len 512"),
    "RWKV-7 0.2B, none, fp32, 1 x 512": ("x070", 12, 768, "float32", "--ctx_len 512 --precision fp32 --peft none"),
    **{
        f"RWKV-6 94 M, full, bf16, 2 x 64, {strategy}, {ranks} x 1": (
            *("x060", 6, 768, "float32"),
            f"{FULL} {strategy} --num_nodes {ranks}",
        )
        for ranks, strategies in ((1, STRATEGIES[:1]), (2, STRATEGIES))
        for strategy in strategies
    },
}
QUICK = ("x060", 1, 64, "float32", "--ctx_len 16 --precision fp32 --bone_r 8")
SIZES = (  # generation, name, layers, channels
    ("x070", "0.1B", 12, 768),
    ("x070", "0.4B", 24, 1024),
    ("x070", "1.5B", 24, 2048),
    ("x070", "2.9B", 32, 2560),
    ("x070", "7.2B", 32, 4096),
    ("x070", "13.3B", 61, 4096),
    ("x060", "1.6B", 24, 2048),
    ("x060", "3B", 32, 2560),
    ("x060", "7B", 32, 4096),
    ("x060", "14B", 61, 4096),
)
RECOMPUTED, KEPT = ("--grad_cp", "1"), ("--grad_cp", "0")
METHODS = (  # name, flags
    ("bat-in", RECOMPUTED),
    ("bat-in, int8", (*RECOMPUTED, "--quant", "int8")),
    ("bat-in, nf4", (*RECOMPUTED, "--quant", "nf4")),
    ("bat-in, blocks kept", KEPT),
    ("bone, blocks kept", (*KEPT, "--bone_mode", "bone")),
    ("lora", (*RECOMPUTED, "--peft", "lora")),
    ("full", (*RECOMPUTED, "--peft", "none")),
)
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)  # GiB


def main():
    parser = Parser(__doc__, what="measure", folder=None)
    parser.add_argument("what", choices=("measure", "table"))
    parser.add_argument("--folder", type=Path, default=Path("out/plan"), help="where measure puts models and runs")
    parser.add_argument("--only", default="", help="measure the runs with this in their names")
    args = parser.parse_args()
    if args.what == "table":
        return table()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    head("run", "planned, GiB", "measured, GiB", "planned / measured")
    for name, run in {"quick": QUICK}.items() if args.quick else RUNS.items():
        if args.only in name:
            measure(folder, name, *run)


def measure(folder, name, version, layers, channels, dtype, flags):
    """Print one line: the plan, and a run's memory."""
    model, data, out = folder / f"{version}-{channels}-{dtype}.pth", folder / "data", folder / "run"
    if not model.exists():
        write_model(model, family_named(version), layers, channels, getattr(torch, dtype))
    if not data.with_suffix(".bin").exists():
        write_tokens(data, VOCABULARY, torch.randint(1, VOCABULARY, (20, 1200)).tolist())
    shutil.rmtree(out, ignore_errors=True)
    inputs = ("--load_model", model, "--data_file", data, "--proj_dir", out, "--accelerator", "cpu")
    flags = [*map(str, inputs), *flags.split()]
    estimate = estimate_of(parse_flags(flags), CPU)
    planned = peak(estimate.parts(), CPU) + estimate.file_pages()
    command = [sys.executable, ROOT / "train.py", *flags, "--epoch_steps", "2"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    nodes = [str(node) for node in range(estimate.config.train.num_nodes)]
    several = [meeting | {"NODE_RANK": node} if len(nodes) > 1 else {} for node in nodes]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | more) for more in several]
    ends = [os.wait4(process.pid, 0)[1:] for process in processes]
    if any(status for status, _ in ends):
        raise SystemExit(f"{name}: train.py ended with {[status for status, _ in ends]}")
    taken = max(usage.ru_maxrss for _, usage in ends) * 1024
    row(name, *(f"{size / 2**30:.2f}" for size in (planned, taken)), f"{planned / taken:.2f}")


def write_model(path, family, layers, channels, dtype):
    """A random model in a file."""
    torch.manual_seed(0)
    shapes = family.shapes(family.new_dimensions(layers, channels, VOCABULARY))
    torch.save({key: tensor(key, shape).to(dtype) for key, shape in shapes.items()}, path)


def tensor(key, shape):
    """A tensor of plausible scale."""
    if key.endswith(("time_decay", ".w0")):
        return torch.full(shape, -3.0)
    return torch.ones(shape) if ".ln" in key and key.endswith("weight") else 0.02 * torch.randn(shape)


def table():
    """Print a GPU's peak by size and method, at 1 x 1024 tokens, rank 64, bf16; blocks are recomputed (--grad_cp 1)
    except in the columns "blocks kept". Last, for bat-in: the smallest card, and the tokens of a micro batch that fit
    24 GiB."""
    head("model", "parameters", *(name for name, _ in METHODS), "least card", "tokens in 24 GiB")
    for version, name, layers, channels in SIZES:
        cells = []
        shape = ("--n_layer", layers, "--n_embd", channels, "--vocab_size", VOCABULARY, "--model_version", version)
        for _, flags in METHODS:
            estimate = estimate_of(parse_flags([*map(str, shape), *flags]), GPU)
            cells.append((peak(estimate.parts(1, 1024), GPU), estimate))
        total = cells[0][1].counts.total - cells[0][1].counts.of_adapter
        least = next((card for card in CARDS if cells[0][0] <= usable(GPU, card << 30)), None)
        tokens = 1024 * largest_rows(cells[0][1], usable(GPU, 24 << 30))
        sizes = (f"{size / 2**30:.1f}" for size, _ in cells)
        row(f"{family_named(version).name} {name}", f"{total / 1e9:.2f} G", *sizes, f"{least} GiB", tokens or "-")


if __name__ == "__main__":
    main()
