"""build_library: built once, found again, safe in parallel, and clear when it cannot."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkv_peft.ops.native import build
from rwkv_peft.ops.native.build import BuildError, build_library, cache_directory
from rwkv_peft.ops.native.cpu import CpuFamily

CODE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def make(tmp_path):
    """make(text, flags, headers) -> the library of a source, which is written if a text is given, in the folder
    `cache`."""
    source = tmp_path / "a source.cpp"  # a space, as users' folders have
    source.write_text(CODE)

    def run(text=None, flags=(), headers=()):
        if text is not None:
            source.write_text(text)
        return build_library("answer", source, ("-fPIC", *flags), headers, tmp_path / "cache")

    return run


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """no_compiler() takes the compilers away."""
    (tmp_path / "nothing").mkdir()
    return lambda: monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def answer(path):
    return ctypes.CDLL(str(path)).answer()


def test_a_library_is_built_once_and_found_again(tmp_path, make):
    first = make()
    assert answer(first) == 42
    written = first.stat().st_mtime_ns
    assert make() == first
    assert first.stat().st_mtime_ns == written
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) in ([".so"], [".lock", ".so"])


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c[:4096], lambda c: b"", lambda c: bytes(len(c))])
def test_a_library_that_was_cut_short_is_built_anew(make, change):
    """Loading it would end the process by a signal, because a page is missing."""
    path = make()
    path.write_bytes(change(path.read_bytes()))
    assert make() == path
    assert answer(path) == 42


def test_a_library_serves_where_no_compiler_is(make, no_compiler):
    made = make(flags=("-O1",))
    no_compiler()
    assert make(flags=("-O1",)) == made
    with pytest.raises(BuildError, match="no g.. or clang..*apt install g"):
        make('extern "C" int answer() { return 43; }', ("-O1",))


def test_a_disk_that_is_full_is_told_in_words(tmp_path, make):
    with pytest.raises(BuildError, match=r"answer in \S+cache: the disk is full, there or in TMPDIR; make"):
        make('#error "library.o: No space left on device"')
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_a_user_without_a_home_is_told_so(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert "point XDG_CACHE_HOME at one" in CpuFamily("wkv6", ()).unavailable()


@pytest.mark.parametrize("mode, user", [(0o777, 0), (0o755, 1)])
def test_a_cache_of_others_is_not_trusted(tmp_path, monkeypatch, mode, user):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_directory()  # it is not there yet
    folder.mkdir()
    cache_directory()
    folder.chmod(mode)
    if os.getuid() == 0:  # whose folders all trust
        os.chown(folder, 4321, -1)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + user)
    with pytest.raises(BuildError, match="other users may put files into"):
        cache_directory()


def test_source_header_and_flags_decide_the_file(tmp_path, make):
    header = tmp_path / "header.h"
    header.write_text("1")
    paths = [make(), make(headers=(header,))]
    header.write_text("2")
    paths += [make(headers=(header,)), make(flags=('-DTEXT="a $b"',))]
    paths.append(make('extern "C" int answer() { return 43; }'))
    assert len(set(paths)) == 5
    assert [answer(path) for path in paths] == [42, 42, 42, 42, 43]


def test_another_checkouts_build_serves(tmp_path):
    """The sources' content decides, not their folder: a second clone compiles nothing."""
    made = []
    for clone in ("one", "two"):
        folder = tmp_path / clone
        folder.mkdir()
        header, source = folder / "answer.h", folder / "answer.cpp"
        header.write_text("#define ANSWER 42")
        source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }')
        made.append(build_library("answer", source, ("-fPIC", f"-I{folder}"), (header,), tmp_path / "cache"))
    assert made[0] == made[1] and answer(made[0]) == 42


def test_processes_that_build_at_once_compile_once(tmp_path, make):
    """Several processes (without torch, which starts slowly) begin together; the compiler notes its runs."""
    log, slow = tmp_path / "log", tmp_path / "g++"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo run >> {log}; sleep 0.3;; esac\n'
        f'exec {build.find_compiler()} "$@"\n'
    )
    slow.chmod(0o755)
    program = (
        "import ctypes, sys; from pathlib import Path; from rwkv_peft.ops.native.build import build_library\n"
        "source, cache = sys.argv[1:]\n"
        "path = build_library('answer', Path(source), ('-fPIC',), cache=Path(cache))\n"
        "sys.exit(ctypes.CDLL(str(path)).answer() != 42)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "a source.cpp"), str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parents[3])}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    processes = [subprocess.Popen(arguments, env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert log.read_text().count("run") == 1


def test_a_dead_builders_lock_and_leftovers_do_not_hinder(make):
    path = make()
    path.unlink()
    (path.parent / "answer.lock").touch()
    (path.parent / "answer.build").mkdir()
    (path.parent / "answer.build" / "library.so").touch()
    start = time.monotonic()
    assert answer(make()) == 42
    assert time.monotonic() - start < 60
    assert not (path.parent / "answer.build").exists()


def test_a_pipe_in_the_place_of_a_library_is_replaced_and_a_folder_is_told(make):
    path = make()
    path.unlink()
    os.mkfifo(path)
    assert answer(make()) == 42
    path.unlink()
    path.mkdir()
    with pytest.raises(BuildError, match="cannot build answer in .*: Is a directory"):
        make()


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path, make):
    with pytest.raises(BuildError, match="undeclared"):
        make("int answer() { return undeclared; }")
    assert not list((tmp_path / "cache").glob("*.so"))
    assert answer(make(CODE)) == 42


def test_a_compiler_that_does_not_run(make, monkeypatch):
    monkeypatch.setattr(build, "find_compiler", lambda: "/nowhere/g++")
    with pytest.raises(BuildError, match="cannot run the compiler .*nowhere"):
        make()


def test_missing_sources_say_what_to_do(tmp_path, make):
    (tmp_path / "a source.cpp").unlink()
    with pytest.raises(BuildError, match="a source.cpp; reinstall"):
        make()


def test_a_cache_that_cannot_be_written(tmp_path, make):
    (tmp_path / "cache").touch()
    with pytest.raises(BuildError, match="make that folder writable"):
        make()
