"""Freed memory stays with the process, which reuses it without the kernel's help. A container's limit counts as the
main memory."""

import platform
import subprocess
import sys

import pytest

from rwkv_peft import memory
from rwkv_peft.tools.plan.command import main as plan

MIB = 1 << 20
CODE = """
import resource, torch
from rwkv_peft.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(2**24).fill_(1.0)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
assert keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a glibc setting")
def test_pages_are_not_made_anew():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    if before < 20 * 100:
        pytest.skip("the system gives huge pages, or freed blocks were kept already")
    assert after < before / 10


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes stand-ins for /proc/self/cgroup and the files of the groups, {name: content}."""

    def write(own, files):
        for path, text in ({"own": own} | {f"groups/{name}": text for name, text in files.items()}).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text + "\n" * bool(text))
        monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
        monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")

    write("", {})
    return write


def limits(limit, used, cached=0):
    stat = f"anon {used - cached}\ninactive_file {cached}\ninactive_anon 5"
    return {"memory.max": str(limit), "memory.current": str(used), "memory.stat": stat}


def at(folder, files):
    return {f"{folder}{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    "own, files",
    [
        ("0::/", limits(64 * MIB, 40 * MIB, 8 * MIB)),  # a container, which sees its own group as the top
        ("0::/job", at("job/", limits("max", MIB)) | limits(64 * MIB, 40 * MIB, 8 * MIB)),  # the one above limits
        ("0::/job/step", at("job/", limits(64 * MIB, 40 * MIB, 8 * MIB)) | limits(128 * MIB, MIB)),
    ],
)
def test_a_containers_limit_is_its_main_memory(groups, own, files):
    groups(own, files)
    assert memory.main_memory() == (64 * MIB, 32 * MIB)


def test_no_limit_leaves_the_machines_memory(groups):
    machine = memory.main_memory()[0]
    for own, files in (("0::/", {}), ("0::/", limits("max", MIB)), ("3:memory:/", {})):
        groups(own, files)
        assert memory.main_memory()[0] == machine > 64 * MIB


def test_a_plan_counts_the_memory_that_a_container_may_use(groups, capsys):
    words = ["--n_layer", "2", "--n_embd", "64", "--bone_r", "16", "--vocab_size", "257", "--accelerator", "cpu"]
    assert plan(words) == 0 and "main memory of" in capsys.readouterr().out
    groups("0::/", limits(512 * MIB, MIB))
    assert plan(words) == 1 and "does not fit" in capsys.readouterr().out
