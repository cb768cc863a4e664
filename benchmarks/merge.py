"""Time and peak memory of merging, on a synthetic base of any size.

    python benchmarks/merge.py --layers 32 --channels 4096 --vocab 65536      (the 7B shape: 15 GB, twice)

It writes a random bfloat16 base and a bat-in adapter on all eight matrices of each block, copies the base
(with fsync) for comparison, merges it in a process of its own, checks the result, and removes everything.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, Parser, head, row

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import open_base
from rwkv_peft.checkpoints.tensors import TensorSpec, write_pth
from rwkv_peft.models.rwkv6 import keys


def main():
    parser = Parser(__doc__, layers=1, channels=64, vocab=256, rank=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", help="where to put the files (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        shapes = make_files(folder, args)
        size = (folder / "base.pth").stat().st_size
        largest = max(torch.Size(shape).numel() for shape in shapes.values()) * 2
        copy_seconds = timed(lambda: copy(folder / "base.pth", folder / "copy.pth"))
        (folder / "copy.pth").unlink()
        inputs = ("--base_model", folder / "base.pth", "--bone_checkpoint", folder / "adapter.safetensors")
        command = [sys.executable, ROOT / "merge_bone.py", *inputs, "--output", folder / "merged.pth"]
        drop_from_cache(folder / "base.pth")
        seconds, peak = run(command)
        merged = open_base(folder / "merged.pth").tensors
        assert list(merged) == list(shapes)
        print(f"base {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, {torch.get_num_threads()} threads")
        bound = f"bound: 4 x largest + 500 MB = {4 * largest / 1e6 + 500:.0f} MB"
        head("", "seconds", "peak resident memory")
        row("copy with fsync", f"{copy_seconds:.1f}", "")
        row("merge_bone.py", f"{seconds:.1f}", f"{peak / 1e6:.0f} MB ({bound})")


def make_files(folder, args):
    """base.pth and adapter.safetensors of the shape asked for; returns the base's shapes."""
    config = keys.RWKV6Config(
        n_layer=args.layers,
        n_embd=args.channels,
        vocab_size=args.vocab,
        dim_att=args.channels,
        dim_ffn=int(args.channels * 3.5) // 32 * 32,
        maa_rank=64,
        decay_rank=128,
    )
    shapes = keys.shapes(config)
    noise = torch.randn(1 << 24).mul_(0.02).bfloat16()

    def tensor(shape):
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // noise.numel()))[:count].view(shape)

    specs = {key: TensorSpec(shape, torch.bfloat16) for key, shape in shapes.items()}
    write_pth(folder / "base.pth", specs, ((key, tensor(shape)) for key, shape in shapes.items()))
    bones = {
        f"blocks.{i}.{target}.bone": 1e-3
        * torch.randn(shapes[f"blocks.{i}.{target}.weight"][1] // args.rank, args.rank, args.rank)
        for i in range(args.layers)
        for target in keys.TARGETS
    }
    metadata = AdapterMetadata(
        "bat-in", rank=args.rank, targets=keys.TARGETS, base_fingerprint=open_base(folder / "base.pth").fingerprint
    )
    save_adapter(folder / "adapter.safetensors", bones, metadata)
    return shapes


def copy(source, target):
    drop_from_cache(source)
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())


def drop_from_cache(path):
    """Ask the system to drop the file's cached pages, so that each contestant reads it from the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run(command):
    """Seconds and peak resident bytes of one child process."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("merge_bone.py failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
