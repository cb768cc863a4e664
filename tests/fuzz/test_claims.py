"""A file's claims about its own sizes are not trusted: a few bytes that claim gigabytes end in a message, and take no
more memory than an honest file."""

import gzip
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from rwkv_peft import commands
from rwkv_peft.errors import UserError

ROOM = 2 << 30  # bytes beyond those of this process
HUGE = 6_000_000_000


@pytest.fixture(autouse=True)
def bounded():
    """Let the process take at most ROOM more than it has, if the system can limit it."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(*words):
    """The message in which a command ends."""
    with pytest.raises(UserError) as error:
        commands.main([str(word) for word in words])
    return str(error.value)


def item(value):
    """The instructions of a pickle that make a value."""
    return pickle.dumps(value, 2)[2:-1]


def call(name, argument):
    """A pickle that calls a function."""
    return b"\x80\x02c" + name.replace(".", "\n").encode() + b"\n" + item(argument) + b"\x85R."


def zipped(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")


def bare(path, *pickles):
    """A file in the format of torch before 1.6, with other pickles after its first three."""
    torch.save({}, path, _use_new_zipfile_serialization=False)
    head = path.read_bytes().removesuffix(pickle.dumps([], 2)).removesuffix(pickle.dumps({}, 2))
    path.write_bytes(head + b"".join(pickles))


def storages(count, numbers):
    """A dict of tensors, each of which names its own storage of so many numbers."""

    def tensor(key):
        name = b"(" + item("storage") + b"ctorch\nDoubleStorage\n" + item(key) + item("cpu") + item(numbers) + b"NtQ"
        shape = item(0) + item((1,)) + item((1,)) + b"\x89ccollections\nOrderedDict\n)R"
        return item(key) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + name + shape + b"tR"

    return b"\x80\x02}(" + b"".join(tensor(f"{number}") for number in range(count)) + b"u."


@pytest.mark.parametrize("name", ["builtins.bytearray", "torch.FloatTensor", "torch.DoubleStorage"])
@pytest.mark.parametrize("place", ["zip", "fourth", "fifth"])
def test_a_pickle_that_calls_for_memory_is_refused_by_name(tmp_path, name, place):
    path, bomb = tmp_path / "model.pth", call(name, HUGE)
    if place == "zip":
        zipped(path, bomb)
    elif place == "fourth":
        bare(path, bomb, pickle.dumps([], 2))
    else:
        bare(path, pickle.dumps({}, 2), bomb)
    assert path.stat().st_size < 1000
    message = refused("inspect", path)
    assert (name in message) == (name != "torch.DoubleStorage")  # which tensors name, and nothing may call
    assert "may hold only tensors" in message or "cannot be read as a PyTorch checkpoint" in message


def test_storages_of_a_bare_pickle_take_no_more_than_their_file(tmp_path):
    path, numbers = tmp_path / "model.pth", 1_000_000
    bare(path, storages(400, numbers), pickle.dumps([str(number) for number in range(400)], 2), bytes(numbers))
    assert "names a size of 400000000" in refused("inspect", path)


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_tensors_that_share_their_bytes_are_refused(tmp_path, tiny_state, command):
    """24 layers are one and the same: their memory, and a file of them, would be larger than this file."""
    state = tiny_state(n_layer=24)
    for key in state:
        if key.startswith("blocks.") and not key.startswith("blocks.0."):
            state[key] = state["blocks.1." + key.split(".", 2)[2]]
    torch.save(state, tmp_path / "m.pth")
    model, output = tmp_path / "m.pth", tmp_path / "o.st"
    message = refused(command, *(("--model", model, "--prompt", "a") if command == "generate" else (model, output)))
    assert "share their bytes" in message and "tensor.clone()" in message and not output.exists()


def test_an_embedding_that_is_the_head_as_well_is_read(tmp_path, tiny_state):
    state = tiny_state()
    torch.save(state | {"head.weight": state["emb.weight"]}, tmp_path / "m.pth")
    assert commands.main(["inspect", str(tmp_path / "m.pth")]) == 0


def preprocess(path, *flags):
    return ["preprocess", path, "--output", path.with_name("out"), "--tokenizer", "bytes", "--workers", "1", *flags]


def test_a_packed_line_is_not_unpacked_beyond_what_a_row_may_have(tmp_path):
    path, block = tmp_path / "rows.jsonl.gz", b"a" * (1 << 24)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _ in range(5):
            file.write(block)
    for words in (preprocess(path), preprocess(path, "--skip_bad_rows")):
        assert "line 2 has more than 67,108,864 bytes" in refused(*words)


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_packed_rows_that_are_all_kept_are_bounded(tmp_path, monkeypatch, command):
    monkeypatch.setattr("rwkv_peft.data.rows.HELD_BYTES", 1 << 20)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a", "question": "b", "answer": "#### 1"}\n' * 30_000))
    words = ["--prompt_file", path] if command == "generate" else ["gsm8k", "--data", path]
    assert "has more than 1,048,576 bytes of rows" in refused(command, "--model", "absent.pth", *words)


def parquet_of(path, array, **settings):
    """A parquet file with one column, text, and without statistics."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    settings = {"compression": "zstd", "store_schema": False, "write_statistics": False} | settings
    parquet.write_table(pyarrow.table({"text": array}), path, dictionary_pagesize_limit=1 << 30, **settings)
    return path


def repeated(pyarrow, text, count):
    """A text that is stored once and referred to in so many places."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([text]))


def test_a_text_that_stands_in_many_rows_is_read_a_row_at_a_time(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = parquet_of(tmp_path / "rows.parquet", repeated(pyarrow, "a" * (4 << 20), 1000))
    assert path.stat().st_size < 1000
    assert commands.main([str(word) for word in preprocess(path, "--split", "[:2]")]) == 0
    assert (tmp_path / "out.bin").stat().st_size == 2 * 2 * ((4 << 20) + 1)


def test_a_text_beyond_what_a_row_may_have_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = parquet_of(tmp_path / "rows.parquet", repeated(pyarrow, "a" * (100 << 20), 1000))
    assert path.stat().st_size < 10_000 and "a row takes 104,857," in refused(*preprocess(path))


def test_a_page_beyond_what_is_unpacked_at_once_is_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr("rwkv_peft.data.parquet_pages.MOST_BYTES", 1 << 20)
    path = parquet_of(tmp_path / "rows.parquet", repeated(pyarrow, "a" * (1 << 20), 10))
    assert "a page of its column text takes 1,048,580 bytes, and at most 1,048,576" in refused(*preprocess(path))


def test_a_row_that_is_a_list_of_one_text_many_times_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    texts = pyarrow.ListArray.from_arrays([0, 4000], repeated(pyarrow, "a" * (1 << 20), 4000))
    assert "a row takes 4,194,3" in refused(*preprocess(parquet_of(tmp_path / "rows.parquet", texts)))


def test_a_row_that_is_a_list_of_countless_nothings_is_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr("rwkv_peft.data.parquet_pages.MOST_VALUES", count := 1 << 16)
    nothings = pyarrow.ListArray.from_arrays([0, count + 1], pyarrow.nulls(count + 1, pyarrow.int8()))
    path = parquet_of(tmp_path / "rows.parquet", nothings)
    assert "hold 65,537 values in one group of rows, and at most 65,536" in refused(*preprocess(path))


def gguf(path, *settings, tensors=0, count=None):
    """A GGUF with settings (bytes after their names), which announces so many tensors."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, len(settings) if count is None else count)
    path.write_bytes(head + b"".join(settings))
    return path


def named(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def listed(kind, count):
    return struct.pack("<IQ", kind, count)


@pytest.mark.parametrize(
    "setting, message",
    [
        (named(b"a", 9, listed(0, 1 << 40)), "it ends within"),
        (named(b"a", 9, listed(4, (1 << 64) - 1)), "it ends within"),
        (named(b"a", 9, listed(8, 1 << 40)), "it ends within"),
        (named(b"a", 9, listed(9, 1) * 50_000), "a list of lists"),
        (named(b"a", 77, b""), "the unknown type 77"),
        (named(b"a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), "codec can't decode"),
        (named(b"\xff\xfe", 4, b"\0\0\0\0"), "codec can't decode"),
        (named(b"a", 8, struct.pack("<Q", 1 << 62)), "it ends within"),
    ],
    ids=["numbers", "many", "texts", "lists", "kind", "value", "name", "length"],
)
def test_a_gguf_is_not_believed_beyond_its_end(tmp_path, setting, message):
    assert message in refused("inspect", gguf(tmp_path / "m.gguf", setting))
    assert "no readable GGUF" in refused("inspect", gguf(tmp_path / "m.gguf", setting, tensors=1 << 60))


def test_a_gguf_may_announce_any_number_of_tensors_and_settings(tmp_path):
    for claims in ({"tensors": 1 << 62}, {"count": 1 << 62}):
        assert "no readable GGUF" in refused("inspect", gguf(tmp_path / "m.gguf", **claims))


def test_a_gguf_with_a_long_list_is_read_and_counted(tmp_path, capsys):
    texts = b"".join(struct.pack("<Q", 1) + b"x" for _ in range(100))
    name = named(b"general.architecture", 8, struct.pack("<Q", 5) + b"rwkv6")
    numbers = named(b"rwkv6.widths", 9, listed(4, 100) + struct.pack("<100I", *range(100)))
    path = gguf(tmp_path / "m.gguf", name, numbers, named(b"tokenizer.ggml.tokens", 9, listed(8, 100) + texts))
    assert commands.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "100 tokens" in out and "widths [0, 1, 2," in out
