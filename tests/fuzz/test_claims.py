"""What a file claims of its own sizes is not believed: a few bytes that stand for gigabytes end in a message, and take
no more memory than an honest file."""

import pickle
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
    """The process may not take ROOM more than it has, where the system can say so."""
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
    """A file of the kind that torch wrote before 1.6, with other pickles behind its first three."""
    torch.save({}, path, _use_new_zipfile_serialization=False)
    head = path.read_bytes().removesuffix(pickle.dumps([], 2)).removesuffix(pickle.dumps({}, 2))
    path.write_bytes(head + b"".join(pickles))


def storages(count, numbers):
    """A dict of tensors of which each names a storage of its own, of so many numbers."""

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
    assert "besides tensors" in message or "cannot be read as a PyTorch checkpoint" in message


def test_storages_of_a_bare_pickle_take_no_more_than_their_file(tmp_path):
    path, numbers = tmp_path / "model.pth", 1_000_000
    bare(path, storages(400, numbers), pickle.dumps([str(number) for number in range(400)], 2), bytes(numbers))
    assert "names a size of 400000000" in refused("inspect", path)


@pytest.mark.parametrize("command", ["generate", "convert"])
def test_tensors_that_share_their_bytes_are_refused(tmp_path, tiny_state, command):
    """24 layers that are one: memory and a file of their size are not this file's."""
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
