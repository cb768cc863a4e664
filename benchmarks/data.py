"""Speed of the loader alone: micro batches of a made-up token file, in tokens per second.

    python benchmarks/data.py [--tokens N] [--ctx_len N] [--micro_bsz N]

One row for each dataload and loss mask, with the reading thread that training uses.
"""

import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.binidx_writer import BinidxWriter
from rwkv_peft.data.sources import build_samples

CASES = (
    ("get", "none"),
    ("get", "file"),
    ("get", "qa"),
    ("pad", "none"),
    ("pad", "file"),
    ("pad", "qa"),
    ("pack", "none"),
    ("only", "none"),
)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--micro_bsz", type=int, default=8)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "data")
        make(prefix, options.tokens)
        print(f"{options.tokens / 1e6:.0f} M tokens, ctx_len {options.ctx_len}, micro_bsz {options.micro_bsz}")
        print("| dataload | loss_mask | opened in s | M tokens/s |\n|---|---|---|---|")
        for dataload, loss_mask in CASES:
            measure(prefix, dataload, loss_mask, options)
    return 0


def measure(prefix, dataload, loss_mask, options):
    """Open the data set, read batches for two seconds, and print a row of the table."""
    micro_bsz = 1 if dataload == "only" else options.micro_bsz
    config = DataConfig(
        path=prefix,
        ctx_len=options.ctx_len,
        dataload=dataload,
        loss_mask=loss_mask,
        mask_id=(7, 8),
        micro_bsz=micro_bsz,
    )
    began = time.perf_counter()
    samples = build_samples(config, 65536)
    opened = time.perf_counter() - began
    batches = iter(TrainBatches(samples, micro_bsz))
    for _ in islice(batches, 10):
        pass
    began, tokens = time.perf_counter(), 0
    while time.perf_counter() - began < 2:
        tokens += next(batches)["mask"].numel()
    rate = tokens / (time.perf_counter() - began)
    batches.close()
    print(f"| {dataload} | {loss_mask} | {opened:.2f} | {rate / 1e6:.1f} |", flush=True)


def make(prefix, total):
    """Documents of 20 to 2,000 tokens; the answer opens with tokens 7, 8 in the middle of each."""
    generator = np.random.default_rng(0)
    with BinidxWriter(prefix, mask=True) as writer:
        written = 0
        while written < total:
            size = int(20 * 100 ** generator.random())
            tokens = generator.integers(9, 65536, size)
            tokens[size // 2 : size // 2 + 2] = 7, 8
            writer.add(tokens, np.arange(size) > size // 2 + 1)
            written += size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
