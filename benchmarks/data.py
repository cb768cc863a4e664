"""Speed of the loader alone: micro batches of a made-up token file, in tokens per second; then rows per second, of
preprocess and of rows that are tokenized while they are read. Seconds are those of processors, all processes together,
so that other work on the machine changes little; what workers win shows only in seconds of an idle machine.

    python benchmarks/data.py [--tokens N] [--ctx_len N] [--micro_bsz N] [--rows N]

One row for each dataload and loss mask, with the reading thread that training uses, over one file and over shards.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.encoding import Encoded
from rwkv_peft.data.shard_writer import ShardWriter
from rwkv_peft.data.sources import build_samples

ROOT = Path(__file__).resolve().parents[1]
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
WORDS = "the model reads a row of words and learns to answer it shortly or at length".split()


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--micro_bsz", type=int, default=8)
    parser.add_argument("--rows", type=int, default=100_000, help="of questions and answers")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        one, cut = (str(Path(folder) / name) for name in ("one", "cut"))
        make(one, options.tokens)
        make(cut, options.tokens, options.tokens // 10)
        print(f"{options.tokens / 1e6:.0f} M tokens, ctx_len {options.ctx_len}, micro_bsz {options.micro_bsz}")
        print("| dataload | loss_mask | opened in s | M tokens/s | of 10 shards |\n|---|---|---|---|---|")
        for dataload, loss_mask in CASES:
            opened, rate = measure(one, dataload, loss_mask, options)
            _, of_shards = measure(cut, dataload, loss_mask, options)
            print(f"| {dataload} | {loss_mask} | {opened:.2f} | {rate / 1e6:.1f} | {of_shards / 1e6:.1f} |", flush=True)
        measure_rows(Path(folder), options)
    return 0


def measure(prefix, dataload, loss_mask, options):
    """Open the data set and read batches for two seconds -> seconds to open it, tokens per second."""
    micro_bsz = 1 if dataload == "only" else options.micro_bsz
    config = DataConfig(
        path=prefix,
        ctx_len=options.ctx_len,
        dataload=dataload,
        loss_mask=loss_mask,
        mask_id=(7, 8) if loss_mask == "qa" else (),
        micro_bsz=micro_bsz,
    )
    began = spent()
    samples = build_samples(config, 65536)
    opened = spent() - began
    batches = iter(TrainBatches(samples, micro_bsz))
    for _ in islice(batches, 10):
        pass
    began, tokens = spent(), 0
    while spent() - began < 1:
        tokens += next(batches)["mask"].numel()
    rate = tokens / (spent() - began)
    batches.close()
    return opened, rate


def measure_rows(folder, options):
    """Print rows per second of preprocess and of --stream, over the same rows of questions and answers."""
    rows = [made_up(number) for number in range(options.rows)]
    jsonl, stored = folder / "rows.jsonl", folder / "rows.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store(rows, stored)
    size = jsonl.stat().st_size / len(rows)
    print(f"\n{len(rows):,} rows of {size:.0f} bytes of JSON, {os.cpu_count()} cores")
    print("| | rows/s of a processor | rows/s of the clock |\n|---|---|---|")
    for path, workers, more in ((jsonl, 1, ()), (jsonl, 2, ()), (jsonl, 1, ("--drop_duplicates",)), (stored, 1, ())):
        began, clock = spent(), time.perf_counter()
        with tempfile.TemporaryDirectory() as output:
            flags = ("--output", f"{output}/data", "--workers", str(workers), *more)
            command = [sys.executable, "-m", "rwkv_peft", "preprocess", path, *flags]
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        what = " ".join(("preprocess", f"of {path.suffix},", "--workers", str(workers), *more))
        rates = (len(rows) / seconds for seconds in (spent() - began, time.perf_counter() - clock))
        print(f"| {what} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |", flush=True)
    config = DataConfig(str(stored), data_type="sft", dataload="pad", loss_mask="file", stream=5000, micro_bsz=8)
    began, clock = spent(), time.perf_counter()
    batches = iter(TrainBatches(build_samples(config, 65536), 8))
    for _ in islice(batches, len(rows) // 8):
        pass
    batches.close()
    rates = (len(rows) / seconds for seconds in (spent() - began, time.perf_counter() - clock))
    print(f"| --stream 5000, to batches of 8 rows | {' | '.join(f'{rate:,.0f}' for rate in rates)} |", flush=True)


def spent():
    """Seconds of processor time of this process, and of those that it began and that have ended."""
    return sum(os.times()[:4])


def made_up(number):
    """A question and its answer, of some hundred bytes; every tenth repeats another."""
    draw = random.Random(number - number % 10 if number % 10 == 9 else number)
    question, answer = (" ".join(draw.choices(WORDS, k=size)) for size in (20, draw.randrange(20, 150)))
    return {"question": f"{question} {draw.random()}?", "answer": answer}


def store(rows, path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)


def make(prefix, total, shard_tokens=0):
    """Documents of 20 to 2,000 tokens; the answer opens with tokens 7, 8 in the middle of each."""
    generator = np.random.default_rng(0)
    with ShardWriter(prefix, 65536, shard_tokens=shard_tokens) as writer:
        written = 0
        while written < total:
            size = int(20 * 100 ** generator.random())
            tokens = generator.integers(9, 65536, size).astype("<u2")
            tokens[size // 2 : size // 2 + 2] = 7, 8
            mask = (np.arange(size) > size // 2 + 1).astype(np.uint8)
            writer.add(Encoded([size], [1.0], tokens.tobytes(), mask.tobytes()))
            written += size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
