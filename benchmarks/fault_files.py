"""Hostile files for faults.py: pickles that run code, sizes that a file claims, rows and vocabularies that are none."""

import functools
import gzip
import json
import sys
from pathlib import Path
from types import MappingProxyType

import torch
from fault_attacks import Attack
from fault_processes import REFUSED

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import make_tiny_state  # noqa: E402
from fuzz import claims, foreign  # noqa: E402
from training.runs import Planted  # noqa: E402

HUGE = 6_000_000_000
INSPECT = ("inspect", "hostile.pth")
PREPROCESS = ("--tokenizer", "bytes", "--workers", 1, "--output", "out")
TRAIN = ("train", "--data_file", "data", "--ctx_len", 24, "--precision", "fp32", "--accelerator", "cpu")
TRAIN += ("--epoch_steps", 4, "--bone_r", 8)
RUN = (*TRAIN, "--load_model", "base.pth", "--proj_dir", "run", "--epoch_count", 2, "--resume", "auto")
NEW = (*TRAIN, "--epoch_count", 1, "--proj_dir", "new")
ADAPTER = ("--bone_checkpoint", "hostile.pth", "--bone_mode", "bat-in")
BEGINS = "run/(config.json|tensorboard/)"  # in which a run that goes on says so before it reads a checkpoint
BASE = ("--base_model", "base.pth")
MODEL = ("--model", "base.pth", "--tokenizer", "bytes", "--prompt", "a")
PROMPTED = ("generate", *MODEL[:4], "--prompt_file", "hostile.jsonl.gz")
EVALUATED = ("eval", "jsonl", *MODEL[:4], "--data", "hostile.jsonl.gz")
COMPARED = ("compare", "--methods", "bone", "--rank", 8, "--seeds", 7, "--steps", 2, "--rates", "1e-3")
COMPARED += ("--output", "compared", "--", *TRAIN[1:-4], "--val_split", 0.2, "--load_model")
# the command for each file of tensors that one takes
READERS = MappingProxyType(
    {
        "inspect": INSPECT,
        "convert": ("convert", "hostile.pth", "out.st"),
        "convert an adapter": ("convert", "hostile.pth", "out.safetensors", "--bone_mode", "bat-in"),
        "merge's base": ("merge", "--base_model", "hostile.pth", "--bone_checkpoint", "run", "--output", "out.pth"),
        "merge's adapter": ("merge", *BASE, *ADAPTER, "--output", "out.pth"),
        "check's base": ("check", "--base_model", "hostile.pth", "--bone_checkpoint", "run", "--merged", "base.pth"),
        "check's adapter": ("check", *BASE, *ADAPTER, "--merged", "base.pth"),
        "check's model": ("check", *BASE, "--bone_checkpoint", "run", "--merged", "hostile.pth"),
        "verify": ("check", "--runtimes", "--merged", "hostile.pth"),
        "verify's state": ("check", "--runtimes", "--merged", "base.pth", "--state", "hostile.pth"),
        "generate": ("generate", "--model", "hostile.pth", *MODEL[2:]),
        "generate's adapter": ("generate", *MODEL, "--adapter", "hostile.pth"),
        "generate's state": ("generate", *MODEL, "--state", "hostile.pth"),
        "eval": ("eval", "jsonl", "--data", "rows.jsonl", "--model", "hostile.pth"),
        "plan": ("plan", "--load_model", "hostile.pth", "--gpu", "24GiB"),
        "train": (*NEW, "--load_model", "hostile.pth"),
        "train's adapter": (*NEW, "--load_model", "base.pth", "--bone_load", "hostile.pth"),
        "train's states": (*NEW, "--load_model", "base.pth", "--train_parts", "state", "--state_load", "hostile.pth"),
        "compare": (*COMPARED, "hostile.pth"),
    }
)


def given(words, write, name="hostile.pth"):
    """The make of an Attack: write(path) writes the file of that name, which the command is given."""

    def make(folder):
        write(folder / name)
        return words

    return make


def saved(path):
    content = {"a.weight": torch.ones(2, 2), "b": Planted(path.parent / "ran")}
    torch.save(content, path)


def pickles():
    return [Attack(reader, given(words, saved), "mkdir|Planted|cannot be read") for reader, words in READERS.items()]


def called(name, path):
    claims.zipped(path, claims.call(name, HUGE))


def one_layer(path):
    torch.save(claims.one_layer_for_all(make_tiny_state(n_layer=24)), path)


def long_row(path):
    """17 GB in 16 MB: each member of a packed file continues the one before."""
    first, more = (gzip.compress(data, 1) for data in (b'{"text": "one"}\n{"text": "', b"a" * (1 << 24)))
    path.write_bytes(first + more * 1000)


def many_rows(path):
    path.write_bytes(gzip.compress(b'{"prompt": "a", "question": "b", "answer": "#### 1"}\n' * 100_000, 1) * 100)


def repeated(size, count, path):
    claims.parquet_of(path, claims.repeated("a" * size, count))


def listed(size, count, path):
    from pyarrow import ListArray

    claims.parquet_of(path, ListArray.from_arrays([0, count], claims.repeated("a" * size, count)))


def nothings(size, count, path):
    from pyarrow import ListArray, int8, nulls

    count += size
    claims.parquet_of(path, ListArray.from_arrays([0, count], nulls(count, int8())))


def read_from(name, write, *words):
    """The make of an Attack: write(path) writes rows into a file of that name, which preprocess reads."""

    def make(folder):
        write(folder / name)
        return ("preprocess", name, *PREPROCESS, *words)

    return make


def emptied(count, path):
    claims.lists_of_nothing(path, count, 4)


def announced(setting, path):
    claims.gguf(path, setting)


def tokenized(content):
    def make(folder):
        (folder / "vocabulary.txt").write_bytes(content)
        return ("preprocess", "--ids", "--tokenizer", "vocabulary.txt", "a")

    return make


VOCABULARIES = MappingProxyType(
    {
        "a length of 10^13": b"5 9999999999999 9999999999999\n",
        "signs": b"5 " + b"-" * 1_000_000 + b"1 1\n",
        "a number of 10^6 digits": b"5 0x" + b"f" * 1_000_000 + b" 1\n",
        "brackets": b"5 " + b"(" * 1_000_000 + b"'a' 1\n",
        "a product": b"5 'a'*99999999999 99999999999\n",
        "an id of 2^24": b"1 'a' 1\n16777215 'b' 1\n",
    }
)


PARQUETS = MappingProxyType(
    {  # how a column repeats a value: its size and count, and what is said of it
        "4 GB of equal texts": (repeated, 4 << 20, 1000, "2 documents"),
        "100 GB of equal texts": (repeated, 100 << 20, 1000, "a row takes 104,857,"),
        "a page of 600 MB": (repeated, 600 << 20, 10, "a page of its column"),
        "a list of 4 GB": (listed, 1 << 20, 4000, "a row takes 4,194,3"),
        "a list of 2^26 nothings": (nothings, 1 << 26, 1, "67,108,865 values in one group"),
    }
)


def sizes():
    attacks = []
    for name in ("builtins.bytearray", "torch.FloatTensor", "torch.DoubleStorage"):
        make = given(INSPECT, functools.partial(called, name))
        attacks.append(Attack(name, make, "holds code or objects|cannot be read"))
    attacks += [
        Attack(f"24 layers that are one, {name}", given(READERS[name], one_layer), "share their bytes")
        for name in ("generate", "convert", "train", "verify")
    ]
    row, rows = "line 2 has more than 67,108,864 bytes", "more rows than fit into 268,435,456 bytes"
    attacks += [
        Attack("17 GB of a row, packed", read_from("rows.jsonl.gz", long_row), row),
        Attack("the same, bad rows skipped", read_from("rows.jsonl.gz", long_row, "--skip_bad_rows"), row),
        Attack("500 MB of rows, packed", given(PROMPTED, many_rows, "hostile.jsonl.gz"), rows),
        Attack("the same, in eval", given(EVALUATED, many_rows, "hostile.jsonl.gz"), rows),
    ]
    for count, said in ((20_000_000, "line 1 has more than 16,777,216 values"), (5_000_000, rows)):
        make = given(PROMPTED, functools.partial(emptied, count), "hostile.jsonl.gz")
        attacks.append(Attack(f"rows of {count:,} empty lists, packed", make, said))
    for name, (write, size, count, told) in PARQUETS.items():
        make = read_from("rows.parquet", functools.partial(write, size, count), "--split", "[:2]")
        attacks.append(Attack(name, make, told, 0 if told.endswith("documents") else REFUSED))
    for name, content in VOCABULARIES.items():
        attacks.append(Attack(f"a vocabulary, {name}", tokenized(content), "line [12]"))
    for name, (setting, told) in claims.GGUFS.items():
        make = given(("inspect", "hostile.gguf"), functools.partial(announced, setting), "hostile.gguf")
        attacks.append(Attack(f"a GGUF, {name}", make, told))
    return attacks


def dated(unit, zone, value, path):
    import pyarrow
    from pyarrow import parquet

    stamps = pyarrow.array([value], pyarrow.int64()).view(pyarrow.timestamp(unit, zone))
    parquet.write_table(pyarrow.table({"text": ["one"], "at": stamps}), path)


def pictured(path):
    from pyarrow import Table

    row = {"text": "one", "image": {"bytes": None, "path": "http://192.0.2.1/picture.png"}}
    folder = foreign.save_folder(path, Table.from_pylist([row]))
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def outside(name, path):
    from pyarrow import Table

    foreign.save_folder(path, Table.from_pylist([{"text": "one"}]), _data_files=[{"filename": name}])


def without_tokens(kind, folder):
    """Rows with a letter that a tokenizer.json has no token for."""
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    tokenizer = foreign.json_file(folder, kind)
    return ("preprocess", "rows.jsonl", "--output", "out", "--workers", 1, "--no-append_eod", "--tokenizer", tokenizer)


def rows():
    stamps = (("us", None, 1 << 62), ("s", None, -(1 << 50)), ("ms", "No/Where", 5), ("us", "+25:61", 5))
    attacks = [
        Attack(f"a date, {stamp}", read_from("rows.parquet", functools.partial(dated, *stamp), *more), "1 document", 0)
        for stamp in stamps
        for more in ((), ("--skip_bad_rows",))
    ]
    attacks += [Attack("a picture at an address", read_from("rows", pictured), "1 document", 0)]
    attacks += [
        Attack(f"rows in {name}", read_from("rows", functools.partial(outside, name)), "no file of its folder")
        for name in ("../outside.arrow", "/etc/passwd")
    ]
    words = "has tokens for every text"
    return attacks + [
        Attack(f"a {kind} without a token", functools.partial(without_tokens, kind), words) for kind in foreign.MODELS
    ]
