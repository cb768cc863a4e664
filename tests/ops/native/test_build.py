"""build_library: built once, found again, safe in parallel, and clear when it cannot."""

import ctypes
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rwkv_peft.ops.native import build
from rwkv_peft.ops.native.build import Recipe, build_library, kept_library
from rwkv_peft.ops.native.compilers import find_program
from rwkv_peft.ops.native.cpu import CpuFamily
from rwkv_peft.ops.native.kept import cache_directory
from rwkv_peft.ops.native.library import BuildError


@pytest.fixture
def compiler():
    return find_program("g++", "clang++", "cc", remedy="install one")


def recipe(folder, compiler, text='extern "C" int answer() { return 42; }', flags=()):
    source = folder / "a source.cpp"  # a space, as users' folders have
    source.write_text(text)
    return Recipe(source, (compiler, "-fPIC", *flags), (compiler, "-shared"))


def answer(path):
    return ctypes.CDLL(str(path)).answer()


def test_a_library_is_built_once_and_found_again(tmp_path, compiler):
    made_by = recipe(tmp_path, compiler)
    first = build_library("answer", made_by, cache=tmp_path / "cache")
    assert answer(first) == 42
    written = first.stat().st_mtime_ns
    assert build_library("answer", made_by, cache=tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == written
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) in ([".so"], [".lock", ".so"])


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c[:4096], lambda c: b"", lambda c: bytes(len(c))])
def test_a_library_that_was_cut_short_is_built_anew(tmp_path, compiler, change):
    """Loading it would end the process by a signal, because a page is missing."""
    made_by = recipe(tmp_path, compiler)
    path = build_library("answer", made_by, cache=tmp_path / "cache")
    path.write_bytes(change(path.read_bytes()))
    assert kept_library("answer", made_by, cache=tmp_path / "cache") is None
    assert build_library("answer", made_by, cache=tmp_path / "cache") == path
    assert answer(path) == 42


def test_a_library_serves_where_no_compiler_is(tmp_path, compiler):
    made_by = recipe(tmp_path, compiler, flags=("-O1",))
    made = build_library("answer", made_by, cache=tmp_path / "cache")
    without = replace(made_by, compile=("", *made_by.compile[1:]), link=("", *made_by.link[1:]))
    assert kept_library("answer", without, cache=tmp_path / "cache") == made
    made_by.source.write_text('extern "C" int answer() { return 43; }')
    assert kept_library("answer", without, cache=tmp_path / "cache") is None


def test_a_disk_that_is_full_is_told_in_words(tmp_path, compiler):
    made_by = recipe(tmp_path, compiler, text='#error "library.o: No space left on device"')
    with pytest.raises(BuildError, match=r"answer in \S+cache: the disk is full, there or in TMPDIR; make"):
        build_library("answer", made_by, cache=tmp_path / "cache")
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


def test_source_header_and_flags_decide_the_file(tmp_path, compiler):
    header = tmp_path / "header.h"
    header.write_text("1")
    cache = tmp_path / "cache"
    made_by = recipe(tmp_path, compiler)
    paths = [build_library("answer", made_by, cache=cache)]
    paths.append(build_library("answer", replace(made_by, headers=(header,)), cache=cache))
    header.write_text("2")
    paths.append(build_library("answer", replace(made_by, headers=(header,)), cache=cache))
    made_by = recipe(tmp_path, compiler, flags=('-DTEXT="a $b"',))
    paths.append(build_library("answer", made_by, cache=cache))
    made_by = recipe(tmp_path, compiler, text='extern "C" int answer() { return 43; }')
    paths.append(build_library("answer", made_by, cache=cache))
    assert len(set(paths)) == 5
    assert [answer(path) for path in paths] == [42, 42, 42, 42, 43]


def test_another_checkouts_build_serves(tmp_path, compiler):
    """The sources' content decides, not their folder: a second clone compiles nothing."""
    made = []
    for clone in ("one", "two"):
        folder = tmp_path / clone
        folder.mkdir()
        header = folder / "answer.h"
        header.write_text("#define ANSWER 42")
        text = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }'
        made_by = recipe(folder, compiler, text, (f"-I{folder}",))
        made.append(build_library("answer", replace(made_by, headers=(header,)), cache=tmp_path / "cache"))
    assert made[0] == made[1] and answer(made[0]) == 42


def test_processes_that_build_at_once_compile_once(tmp_path, compiler):
    """Several processes (without torch, which starts slowly) begin together; the compiler notes its runs."""
    log, slow = tmp_path / "log", tmp_path / "compiler"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo run >> {log}; sleep 0.3;; esac\nexec {compiler} "$@"\n'
    )
    slow.chmod(0o755)
    recipe(tmp_path, compiler)
    program = (
        "import ctypes, sys; from pathlib import Path; from rwkv_peft.ops.native.build import Recipe, build_library\n"
        "source, compiler, cache = sys.argv[1:]\n"
        "recipe = Recipe(Path(source), (compiler, '-fPIC'), (compiler, '-shared'))\n"
        "path = build_library('answer', recipe, Path(cache))\n"
        "sys.exit(ctypes.CDLL(str(path)).answer() != 42)"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "a source.cpp"), str(slow), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(Path(build.__file__).parents[3])}
    processes = [subprocess.Popen(arguments, env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert log.read_text().count("run") == 2  # one compilation, one link


def test_a_dead_builders_lock_and_leftovers_do_not_hinder(tmp_path, compiler):
    made_by = recipe(tmp_path, compiler)
    path = build_library("answer", made_by, cache=tmp_path / "cache")
    path.unlink()
    (path.parent / "answer.lock").touch()
    (path.parent / "answer.build").mkdir()
    (path.parent / "answer.build" / "library.so").touch()
    start = time.monotonic()
    assert answer(build_library("answer", made_by, cache=tmp_path / "cache")) == 42
    assert time.monotonic() - start < 60
    assert not (path.parent / "answer.build").exists()


def test_a_pipe_in_the_place_of_a_library_is_replaced_and_a_folder_is_told(tmp_path, compiler):
    made_by = recipe(tmp_path, compiler)
    path = build_library("answer", made_by, cache=tmp_path / "cache")
    path.unlink()
    os.mkfifo(path)
    assert kept_library("answer", made_by, cache=tmp_path / "cache") is None
    assert answer(build_library("answer", made_by, cache=tmp_path / "cache")) == 42
    path.unlink()
    path.mkdir()
    assert kept_library("answer", made_by, cache=tmp_path / "cache") is None
    with pytest.raises(BuildError, match="cannot build answer in .*: Is a directory"):
        build_library("answer", made_by, cache=tmp_path / "cache")


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path, compiler):
    made_by = recipe(tmp_path, compiler, text="int answer() { return undeclared; }")
    with pytest.raises(BuildError, match="undeclared"):
        build_library("answer", made_by, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.so"))
    made_by = recipe(tmp_path, compiler)
    assert answer(build_library("answer", made_by, cache=tmp_path / "cache")) == 42


def test_a_compiler_that_does_not_run(tmp_path, compiler):
    made_by = recipe(tmp_path, compiler)
    with pytest.raises(BuildError, match="cannot run the compiler .*nowhere"):
        build_library("answer", replace(made_by, compile=("/nowhere/g++",)), cache=tmp_path / "cache")


def test_missing_program_and_missing_sources_say_what_to_do(tmp_path, compiler):
    with pytest.raises(BuildError, match="no g-- or clang--.*apt install it"):
        find_program("g--", "clang--", remedy="apt install it")
    made_by = recipe(tmp_path, compiler)
    made_by.source.unlink()
    with pytest.raises(BuildError, match="a source.cpp; reinstall"):
        build_library("answer", made_by, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path, compiler):
    made_by = recipe(tmp_path, compiler)
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="make that folder writable"):
        build_library("answer", made_by, cache=tmp_path / "file" / "cache")
