"""Speed of text to tokens on one core, beside a plain Python World tokenizer.

    python benchmarks/preprocess.py [FILE.jsonl | FILE.txt ...]

Without a file it makes 20 MB of mixed text from a seed. Prints MB of text per second of processor time.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from rwkv_peft.data.encode_settings import EncodeSettings
from rwkv_peft.data.encoding import encode_chunk, encoder
from rwkv_peft.data.preprocess import write
from rwkv_peft.data.rows import read_chunks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE.jsonl|FILE.txt", help="texts; without one, 20 MB are made")
    files = parser.parse_args().files
    with tempfile.TemporaryDirectory() as folder:
        paths = files or [make_text(Path(folder) / "mixed.jsonl", 20_000_000)]
        settings = EncodeSettings()
        encoder(settings)  # loading the vocabulary is not what is timed
        chunks = [chunk for path in paths for chunk in read_chunks(path, pieces=True)]
        texts = [text for chunk in chunks for text in texts_of(chunk)]
        size = sum(len(text.encode()) for text in texts) / 1e6
        print(f"{size:.1f} MB of text in {len(texts)} pieces")
        began = time.process_time()
        write(paths, Path(folder) / "out", settings, workers=1)
        report("rwkv_peft.data.preprocess, files to files", size, time.process_time() - began)
        began = time.process_time()
        for chunk in chunks:
            encode_chunk(chunk, settings)
        report("rows to tokens, without files", size, time.process_time() - began)
        plain(texts, encoder(settings).tokenizer.path)
    return 0


def plain(texts, vocabulary):
    """Time the tokenizer of the rwkv package, in Python, over the first 2 MB."""
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    tokenizer, done = TRIE_TOKENIZER(str(vocabulary)), 0
    began = time.process_time()
    for text in texts:
        tokenizer.encode(text)
        done += len(text.encode())
        if done > 2e6:
            break
    report("rwkv package's TRIE_TOKENIZER (Python), tokens alone", done / 1e6, time.process_time() - began)


def report(name, size, seconds):
    print(f"{size / seconds:8.1f} MB/s  {name}")


def texts_of(chunk):
    for item in chunk.items:
        yield item if isinstance(item, str) else json.loads(item)["text"]


def make_text(path, size):
    """Write rows of prose, code, numbers and other scripts, about `size` bytes, drawn by a fixed seed."""
    generator, written = random.Random(0), 0
    words = (
        "the of and to in is that it was for on are with as his they be at one have this from or had by but "
        "some what there we can out other were all your when up use how said an each she which do their time "
        "training learning gradient adapter question answer because"
    ).split()
    other = ("это большой город и река", "今天天气很好我们去公园", "la casa es grande y roja", "私は毎日学校に行きます")
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            lines = []
            for _ in range(generator.randint(2, 12)):
                kind = generator.random()
                if kind < 0.7:
                    lines.append(" ".join(generator.choices(words, k=generator.randint(8, 60))).capitalize() + ".")
                elif kind < 0.8:
                    lines.append(
                        f"    for i in range({generator.randint(1, 99)}):\n"
                        f"        total += x[i] * {generator.random():.4f}"
                    )
                elif kind < 0.9:
                    lines.append(f"{generator.randint(1, 9999)} + {generator.randint(1, 9999)} = ?")
                else:
                    lines.append(generator.choice(other))
            row = json.dumps({"text": "\n".join(lines)}, ensure_ascii=False) + "\n"
            written += len(row.encode())
            file.write(row)
    return path


if __name__ == "__main__":
    sys.exit(main())
