"""Speed of text to tokens, beside a plain Python World tokenizer; of the loader, in tokens per second; and of rows, by
preprocess. Rates are for a second of processor time, all processes together, so that other work on the machine changes
little.

    python benchmarks/data.py                            all three
    python benchmarks/data.py --only text [--text FILE.jsonl | FILE.txt ...]
    python benchmarks/data.py --only loader rows [--tokens N] [--ctx_len N] [--micro_bsz N] [--rows N]

Without --text, --megabytes of mixed text are made from a seed. The loader has one row for each dataload and loss mask,
with the reading thread that training uses.
"""

import json
import os
import random
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from common import ROOT, Parser, head, row, run, write_tokens

from rwkv_peft.config import DataConfig
from rwkv_peft.data.batches import TrainBatches
from rwkv_peft.data.encoding import EncodeSettings, Totals, encoder
from rwkv_peft.data.preprocess import write
from rwkv_peft.data.rows import read_rows
from rwkv_peft.data.sources import build_samples

CASES = "get none, get file, get qa, pad none, pad file, pad qa, pack none, only none".split(", ")
WORDS = (
    "the of and to in is that it was for on are with as his they be at one have this from or had by but "
    "some what there we can out other were all your when up use how said an each she which do their time "
    "training learning gradient adapter question answer because"
).split()
OTHER = ("это большой город и река", "今天天气很好我们去公园", "la casa es grande y roja", "私は毎日学校に行きます")


def text(folder, options):
    """Print MB of text per second."""
    paths = options.text or [make_text(folder / "mixed.jsonl", 1e6 * options.megabytes)]
    settings = EncodeSettings()
    encoder(settings)  # loading the vocabulary is not what is timed
    items = [item for path in paths for _, item in read_rows(path)]
    texts = [item if isinstance(item, str) else json.loads(item)["text"] for item in items]
    size = sum(len(one.encode()) for one in texts) / 1e6
    print(f"{size:.1f} MB of text in {len(texts)} pieces")
    head("", "MB/s")
    files = seconds(partial(write, paths, folder / "out", settings))
    row("preprocess, files to files", f"{size / files:.1f}")
    encoded = seconds(lambda: [encoder(settings).encode("", item, Totals()) for item in items])
    row("rows to tokens, without files", f"{size / encoded:.1f}")
    plain(texts, encoder(settings).tokenizer.path)


def plain(texts, vocabulary):
    """Time the tokenizer of the rwkv package, in Python, over the first 2 MB."""
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    tokenizer, done = TRIE_TOKENIZER(str(vocabulary)), 0
    began = time.process_time()
    for one in texts:
        tokenizer.encode(one)
        done += len(one.encode())
        if done > 2e6:
            break
    taken = time.process_time() - began
    row("rwkv package's TRIE_TOKENIZER (Python), tokens alone", f"{done / 1e6 / taken:.1f}")


def make_text(path, size):
    """Write rows of prose, code, numbers and other scripts, about `size` bytes, drawn by a fixed seed."""
    draw, written = random.Random(0), 0

    def line():
        kind = draw.random()
        if kind < 0.7:
            return " ".join(draw.choices(WORDS, k=draw.randint(8, 60))).capitalize() + "."
        if kind < 0.8:
            return f"    for i in range({draw.randint(1, 99)}):\n        total += x[i] * {draw.random():.4f}"
        return f"{draw.randint(1, 9999)} + {draw.randint(1, 9999)} = ?" if kind < 0.9 else draw.choice(OTHER)

    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            made = json.dumps({"text": "\n".join(line() for _ in range(draw.randint(2, 12)))}, ensure_ascii=False)
            written += file.write(made + "\n")
    return path


def loader(folder, options):
    """Print the table of micro batches."""
    made = documents(options.tokens)
    masks = [np.arange(len(document)) > len(document) // 2 + 1 for document in made]
    write_tokens(folder / "one", 65536, made, masks)
    print(f"\n{options.tokens / 1e6:g} M tokens, ctx_len {options.ctx_len}, micro_bsz {options.micro_bsz}")
    head("dataload", "loss_mask", "opened in s", "M tokens/s")
    for case in CASES:
        opened, rate = batches_of(folder / "one", *case.split(), options)
        row(*case.split(), f"{opened:.2f}", f"{rate / 1e6:.1f}")


def documents(total):
    """Documents of 20 to 2,000 tokens; the answer opens with tokens 7, 8 in the middle of each."""
    generator, found = np.random.default_rng(0), []
    while total > 0:
        size = int(20 * 100 ** generator.random())
        found.append(generator.integers(9, 65536, size))
        found[-1][size // 2 : size // 2 + 2] = 7, 8
        total -= size
    return found


def batches_of(prefix, dataload, loss_mask, options):
    """Open the data set and read batches for --seconds -> seconds to open it, tokens per second."""
    micro_bsz = 1 if dataload == "only" else options.micro_bsz
    kind = dict(dataload=dataload, loss_mask=loss_mask, mask_id=(7, 8) if loss_mask == "qa" else ())
    began = spent()
    samples = build_samples(DataConfig(str(prefix), ctx_len=options.ctx_len, micro_bsz=micro_bsz, **kind), 65536)
    opened = spent() - began
    batches = iter(TrainBatches(samples, micro_bsz))
    for _ in islice(batches, 10):
        pass
    began, tokens = spent(), 0
    while spent() - began < options.seconds:
        tokens += next(batches)["mask"].numel()
    rate = tokens / (spent() - began)
    batches.close()
    return opened, rate


def rows(folder, options):
    """Print rows per second of preprocess, over the same rows of questions and answers."""
    from pyarrow import Table, parquet

    made = [made_up(number) for number in range(options.rows)]
    jsonl, stored = folder / "rows.jsonl", folder / "rows.parquet"
    jsonl.write_text("".join(json.dumps(one) + "\n" for one in made))
    parquet.write_table(Table.from_pylist(made), stored, row_group_size=1000)
    print(f"\n{len(made):,} rows of {jsonl.stat().st_size / len(made):.0f} bytes of JSON, {os.cpu_count()} cores")
    head("", "rows/s of a processor", "rows/s of the clock")
    kinds = str(jsonl), f"{jsonl} --drop_duplicates", str(stored)
    for number, words in enumerate(kinds[2:] if options.quick else kinds):
        command = (ROOT / "RWKV-PEFT" / "rwkv_peft" / "children.py", "rwkv_peft", "preprocess", *words.split())
        rates(words.replace(str(jsonl.parent), ""), len(made), partial(run, *command, "--output", folder / str(number)))


def rates(name, count, function):
    clock = time.perf_counter()
    taken = seconds(function)
    row(name, *(f"{count / each:,.0f}" for each in (taken, time.perf_counter() - clock)))


def seconds(function):
    """Seconds of processor time of a call."""
    began = spent()
    function()
    return max(spent() - began, 0.01)


def spent():
    """Seconds of processor time of this process, and of those that it began and that have ended."""
    return sum(os.times()[:4])


def made_up(number):
    """A question and its answer, of some hundred bytes; every tenth repeats another."""
    draw = random.Random(number - number % 10 if number % 10 == 9 else number)
    question, answer = (" ".join(draw.choices(WORDS, k=size)) for size in (20, draw.randrange(20, 150)))
    return {"question": f"{question} {draw.random()}?", "answer": answer}


PARTS = {"text": text, "loader": loader, "rows": rows}


def main():
    parser = Parser(__doc__, megabytes=0.05, tokens=20_000, ctx_len=64, rows=64, seconds=0.02)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--text", nargs="+", metavar="FILE", help="texts in place of those that are made")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--micro_bsz", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1, help="of reading batches")
    parser.add_argument("--rows", type=int, default=100_000, help="of questions and answers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            PARTS[name](Path(folder), options)


if __name__ == "__main__":
    main()
