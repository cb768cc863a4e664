"""Writing files: a whole file or none, and a message with the reason; locks, which hold every other process out until
their own ends; digests of whole files, computed once and anew if a file changes."""

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
import threading
import zipfile

import pytest
import torch

from rwkv_peft.checkpoints import digest
from rwkv_peft.checkpoints.atomic import atomic_write, check_output, place
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.checkpoints.digest import digest_below, digest_of
from rwkv_peft.checkpoints.lock import Busy, hold, holder
from rwkv_peft.checkpoints.tensors import TensorSpec, write_pth
from rwkv_peft.cli.errors import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_streamed_pth_is_what_torch_save_would_give(tmp_path, dtype):
    state = {
        "b": torch.arange(35).view(5, 7).to(dtype),
        "a": torch.arange(3).to(dtype)[None],
        "t": torch.ones(6, 4, dtype=dtype).T,
        "scalar": torch.tensor(2).to(dtype),
        "none": torch.empty(0, 3, dtype=dtype),
    }
    save_model(tmp_path / "m.pth", state)
    for mapped in (True, False):
        loaded = torch.load(tmp_path / "m.pth", weights_only=True, mmap=mapped)
        assert list(loaded) == list(state)
        for key, tensor in state.items():
            assert loaded[key].dtype == dtype and torch.equal(loaded[key], tensor)
    with zipfile.ZipFile(tmp_path / "m.pth") as archive:
        assert archive.testzip() is None  # every checksum holds
    first = (tmp_path / "m.pth").read_bytes()
    save_model(tmp_path / "m.pth", state)
    assert first == (tmp_path / "m.pth").read_bytes()


def test_streaming_refuses_a_tensor_that_was_not_announced(tmp_path):
    specs = {"a": TensorSpec((2,), torch.float32)}
    two, other = ("a", torch.zeros(2)), ("b", torch.zeros(2))
    for tensors in ([("a", torch.zeros(3))], [other], [], [two, other]):
        with pytest.raises(ValueError):
            write_pth(tmp_path / "m.pth", specs, tensors)


def test_atomic_write_replaces_or_leaves_untouched(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("interrupted")
    assert path.read_text() == "one" and os.listdir(path.parent) == ["file"]
    with pytest.raises(UserError, match="is a folder"), atomic_write(tmp_path):
        pass


def test_what_others_could_not_read_stays_so(tmp_path):
    path, before = tmp_path / "answers.jsonl", os.umask(0o022)
    try:
        for mode, after in ((None, 0o644), (0o600, 0o600), (0o440, 0o640), (0o666, 0o644)):
            if mode is not None:
                path.chmod(mode)
            with atomic_write(path) as temporary:
                temporary.write_text("x")
            assert path.stat().st_mode & 0o777 == after
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_a_folder_that_was_made_for_what_did_not_come_goes(tmp_path, error):
    (tmp_path / "old").mkdir()
    for folder in ("old", "new/deeper"):
        with pytest.raises(error), atomic_write(tmp_path / folder / "file"):
            raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


WRITER = """
import os, signal, sys
from rwkv_peft.checkpoints.atomic import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writers_file_is_removed_by_the_next_and_a_living_ones_is_not(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "file")], env=environment)
    (killed,) = os.listdir(tmp_path)
    assert killed.startswith(f".file.{place()}-") and killed.endswith(".tmp")
    other = f".file.00000000-{killed.split('-')[1]}-00000000.tmp"  # of another machine, where the number may live
    (tmp_path / other).touch()
    with atomic_write(tmp_path / "living") as living, atomic_write(tmp_path / "new"):
        assert living.exists() and killed not in os.listdir(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([other, "living", "new"])


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError("128000 requested and 68544 written"), "the disk refused the data"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5568 vs 5462"), "the disk refused"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            "the disk refused the data",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "no permission to write there .read-only"),
        (OSError(errno.EFBIG, "File too large"), "file too large"),
        (OSError(errno.EIO, "Input/output error", "/elsewhere/input.pth"), "input/output error ./elsewhere/input.pth."),
        (OSError("a message without a number"), "a message without a number"),
    ],
)
def test_every_failure_to_write_is_told_in_words(tmp_path, error, reason):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match=f"cannot write .*file: {reason}"), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "name, reason",
    [
        ("plain/x.pth", "a file stands where"),
        ("plain/deeper/x.pth", "a file stands where"),
        ("x" * 300, "file name too long"),
        ("/proc/x.pth", "no such file|no permission"),
        ("/dev/null", "is a device"),
        (".", "is a folder"),
    ],
)
@pytest.mark.parametrize("writing", [True, False])
def test_names_that_cannot_be_written_are_refused(tmp_path, name, reason, writing):
    (tmp_path / "plain").write_text("a plain file")
    with pytest.raises(UserError, match=reason):
        if writing:
            with atomic_write(tmp_path / name):
                pass
        else:
            check_output("--output", tmp_path / name, [])
    assert os.listdir(tmp_path) == ["plain"]


def test_an_output_is_no_input_by_any_name_and_its_check_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "input").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "input")
    before = sorted(tmp_path.rglob("*"))
    for source in (tmp_path / "folder" / "input", tmp_path / "folder", tmp_path / "link"):
        with pytest.raises(UserError, match="--output .* is the file given as --input"):
            check_output("--output", tmp_path / "link", [("--input", source), ("--none", None)])
    check_output("--output", tmp_path / "folder" / ".." / "file", [])
    check_output("--output", tmp_path / "new" / "deeper" / "file", [("--input", tmp_path / "folder")])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_home_folder_that_no_shell_has_put_in_is_told(tmp_path, monkeypatch):
    """A shell does not expand --output=~/m.pth, which would make a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    checked = lambda path: check_output("--output", path, [])  # noqa: E731
    for read_or_written in (open_base, checked, lambda path: save_model(path, {})):
        with pytest.raises(UserError, match=f"~/m.pth: a shell replaces ~ .*; give {tmp_path}/home/m.pth"):
            read_or_written("~/m.pth")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match="a path of Windows; in WSL give /mnt/c/a b/m.pth"):
        check_output("--output", r"C:\a b\m.pth", [])
    check_output("--output", "~m.pth", [])
    (tmp_path / "~").mkdir()
    check_output("--output", "~/m.pth", [])


HOLD = "import sys; from pathlib import Path; from rwkv_peft.checkpoints.lock import hold\n"


def test_one_holds_it_and_is_named(tmp_path):
    words = f"process {os.getpid()} on {platform.node()}, since 20"
    with hold(tmp_path / "lock"), pytest.raises(Busy, match=words), hold(tmp_path / "lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_the_holder_keeps_nobody_from_it(tmp_path):
    with open(tmp_path / "lock", "w") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        done = threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN))
        done.start()
        with hold(tmp_path / "lock"):
            done.join()
            assert holder(tmp_path / "lock")["process"] == os.getpid()
    assert holder(tmp_path / "lock") is None


def test_a_killed_process_holds_nothing(tmp_path):
    code = HOLD + "with hold(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with pytest.raises(Busy, match=f"process {process.pid} on"), hold(tmp_path / "lock"):
            pass
        process.send_signal(signal.SIGKILL)
    assert holder(tmp_path / "lock") is None and (tmp_path / "lock.json").exists()
    with hold(tmp_path / "lock"):
        assert holder(tmp_path / "lock")["process"] == os.getpid()


def test_two_never_hold_it_at_once(tmp_path):
    """Each removes the file as it lets go, while others open it."""
    code = HOLD + (
        "from rwkv_peft.checkpoints.lock import Busy; import os\n"
        "path, won = Path(sys.argv[1]), 0\n"
        "while won < 50:\n"
        "    try:\n"
        "        with hold(path / 'lock'):\n"
        "            os.mkdir(path / 'held'); os.rmdir(path / 'held'); won += 1\n"
        "    except Busy: pass\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """The files that were read whole, in order; every file is treated as large, and none as new."""
    read, real = [], digest.sha256_of
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "LARGE", 1)
    monkeypatch.setattr(digest, "SETTLED", -1.0)
    monkeypatch.setattr(digest, "sha256_of", lambda path: read.append(path.name) or real(path))
    return read


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").write_bytes(b"abc" * 1000)
    return tmp_path / "data" / "a.bin"


def test_a_digest_is_made_once_and_told_apart_by_size_and_time(data, reads):
    first = digest_of(data)
    assert digest_of(data) == first and reads == ["a.bin"]
    os.utime(data, ns=(0, 1))
    assert digest_of(data) == first and len(reads) == 2
    content = data.read_bytes()
    data.write_bytes(content[:-1] + b"d")  # at another time
    assert digest_of(data) != first
    os.utime(data, ns=(0, 1))
    data.write_bytes(content + b"d")
    os.utime(data, ns=(0, 1))
    assert digest_of(data) != first and len(reads) == 4
    data.write_bytes(content)
    assert digest_of(data) == first


def test_a_cache_that_cannot_be_written_costs_time_alone(data, reads, monkeypatch, tmp_path):
    (tmp_path / "cache").touch()
    assert digest_of(data) == digest_of(data) and reads == ["a.bin"] * 2
    assert [path.name for path in data.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("kept", ["", "[]", '{"bytes": 3000}', '{"sha256": 5}'])
def test_a_damaged_record_is_passed_over(data, reads, tmp_path, kept):
    first = digest_of(data)
    (record,) = tmp_path.glob("cache/rwkv_peft/digests/*.json")
    record.write_text(kept)
    assert digest_of(data) == first and len(reads) == 2


def test_a_folder_is_told_by_the_names_and_contents_of_its_files(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("b" if name == "three" else "a")).write_text("abc")
    one, two, three = (digest_below(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three and digest_of(tmp_path / "one") == "" == digest_of(tmp_path / "absent")
    (tmp_path / "two" / "a").write_text("abd")
    assert digest_below(tmp_path / "two") != one
