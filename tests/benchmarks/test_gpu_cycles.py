"""The model of a multiprocessor counts what small listings take, and finds wkv6's kernels as fast as they are to be."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_peft.ops.native.compilers import find_nvcc
from rwkv_peft.ops.native.errors import BuildError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
COMMAND = [sys.executable, str(FOLDER / "gpu_cycles.py")]


@pytest.fixture(scope="module")
def modules():
    """sass, multiprocessor and gpu_cycles, which import each other by these names."""
    loaded = []
    for name in ("sass", "multiprocessor", "gpu_cycles"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded.append(module)
    return loaded


def listing(*lines, name="kernel"):
    """As cuobjdump prints it. A line: text, or (text, stall, write, read, waits); "{3}" in it is where line 3 is."""
    printed = [f"\t\tFunction : {name}"]
    for place, line in enumerate(lines):
        text, stall, write, read, waits = line if isinstance(line, tuple) else (line, 1, 7, 7, 0)
        text = re.sub(r"\{(\d+)\}", lambda found: hex(int(found.group(1)) * 16), text)
        control = (stall | write << 5 | read << 8 | waits << 11) << 41
        printed += [f"        /*{place * 16:04x}*/        {text} ;      /* 0x{7:016x} */", f"   /* 0x{control:016x} */"]
    return "\n".join(printed) + "\n"


def loop(*body):
    """A kernel whose loop is `body`."""
    return listing(*body, "@P0 BRA {0}", "EXIT")


def way(sass, text, **told):
    return sass.Way(sass.read_listing(text, "kernel"), sass.Loop(**told))


def executed(way, warp=0, number=1):
    return [f"{instruction.opcode} {instruction.operands}".strip() for instruction in way.turn(warp, number)]


def test_a_listing_is_read(modules):
    sass, *_ = modules
    text = listing("NOP", name="other") + listing(("@!P3 LDS.64 R4, [R2+0x10]", 5, 1, 2, 0b100001), "EXIT")
    load, end = sass.read_listing(text, "kernel")
    assert (load.opcode, load.predicate, load.operands, load.address) == ("LDS.64", "!P3", "R4, [R2+0x10]", 0)
    assert (load.stall, load.write, load.read, load.waits) == (5, 1, 2, (0, 5))
    assert load.results == {4, 5} and load.needs == {2, 4, 5}
    assert end.name == "EXIT"
    with pytest.raises(KeyError):
        sass.read_listing(text, "absent")


def test_loops_inside_take_their_turns(modules):
    sass, *_ = modules
    text = loop("FADD R1, R1, R1", "FMUL R2, R2, R2", "@P1 BRA {1}", "MUFU.RCP R3, R3")
    found = executed(way(sass, text, turns=(3,)))
    assert [line.split()[0] for line in found] == ["FADD", *["FMUL", "BRA"] * 3, "MUFU.RCP", "BRA"]
    with pytest.raises(ValueError, match="1 loops"):
        way(sass, text)


def test_branches_do_the_work_of_a_steady_state(modules):
    sass, *_ = modules
    optional = loop("@P1 BRA {3}", "FADD R1, R1, R1", "FADD R2, R2, R2", "FMUL R3, R3, R3")
    assert len(executed(way(sass, optional))) == 5
    rare = loop("@P1 BRA {3}", "NOP", "CALL.REL.NOINC 0x900", "FMUL R3, R3, R3")
    assert "CALL.REL.NOINC 0x900" not in executed(way(sass, rare))
    kept = loop("@P1 BRA {3}", "STG.E [R2], R1", "STG.E [R4], R1", "@P2 BRA {5}", "STG.E [R6], R1", "NOP")
    stores = [sum("STG" in line for line in executed(way(sass, kept, keeps=4), number=n)) for n in range(5)]
    assert stores == [3, 1, 1, 1, 3]


@pytest.mark.parametrize("first, second", [(3, 70), (70, 3)])
def test_the_longer_of_two_sides_is_taken_or_by_one_warp_alone(modules, first, second):
    sass, *_ = modules
    lines = [f"@P1 BRA {{{first + 2}}}", *["FADD R1, R1, R1"] * first, f"BRA {{{first + second + 2}}}"]
    text = loop(*lines, *["FMUL R2, R2, R2"] * second, "NOP")
    longest = max(first, second)
    assert len(executed(way(sass, text))) >= longest + 3
    alone = way(sass, text, lone=(2,))
    assert [len(executed(alone, warp)) > longest for warp in range(4)] == [False, False, True, False]
    with pytest.raises(ValueError, match="1 branches"):
        way(sass, text, lone=(0, 1))


def test_helpers_take_the_other_of_two_long_sides(modules):
    sass, *_ = modules
    text = loop("@P1 BRA {72}", *["FADD R1, R1, R1"] * 70, "BRA {152}", *["FMUL R2, R2, R2"] * 80, "NOP")
    found = way(sass, text, helpers=2)
    assert ["FMUL R2, R2, R2" in executed(found, warp) for warp in range(4)] == [False, False, True, True]


@pytest.mark.parametrize(
    "body, one, two",
    [
        # A scheduler issues one instruction a cycle, here of two blocks in turn; the branch stalls for six.
        (["FADD R1, R2, R3"] * 40, 46, 82),
        # A product is there after 33 cycles, and a second block's fits between.
        (["HMMA.16816.F32.BF16 R8, R4, R2, R8"] * 8, 264, 264),
        # A scoreboard is free when what was asked of shared memory is there.
        ([("LDS R4, [R2]", 1, 0, 7, 0), ("FADD R5, R4, R4", 1, 7, 7, 1)], 36, 36),
    ],
)
def test_instructions_take_their_time(modules, body, one, two):
    sass, multiprocessor, _ = modules
    found = way(sass, loop(*body))
    for blocks, cycles in ((1, one), (2, two)):
        taken = multiprocessor.Multiprocessor(found, 4, blocks, 0).run(16)
        assert taken == pytest.approx(cycles, abs=6), blocks


def test_a_barrier_waits_for_the_slowest_warp(modules):
    sass, multiprocessor, _ = modules
    lines = ["BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 BRA {4}", "NOP", "BRA {104}", *["MUFU.RCP R2, R3"] * 100, "NOP"]
    quick = multiprocessor.Multiprocessor(way(sass, loop(*lines), lone=(9,)), 4, 1, 0).run(16)
    slow = multiprocessor.Multiprocessor(way(sass, loop(*lines), lone=(3,)), 4, 1, 0).run(16)
    assert quick < 60 and slow == pytest.approx(100 * 8, rel=0.1)


def test_times_follow_from_cycles_and_traffic(modules):
    *_, gpu_cycles = modules
    kernel = gpu_cycles.Kernel("any", 16, moves=1, fits=(1, 2, 4))
    found, card = {1: 1000.0, 2: 1500.0, 4: 2500.0}, gpu_cycles.MULTIPROCESSORS
    for blocks, cycles in ((1, 1000), (card, 1000), (card + 1, 1500), (3 * card, 2000), (5 * card, 2 * 2000)):
        expected = cycles * 10 / gpu_cycles.CLOCK
        assert gpu_cycles.seconds(kernel, found, blocks, 160) == pytest.approx(expected), blocks
    heavy = gpu_cycles.Kernel("any", 16, moves=1000, fits=(1, 2, 4))
    assert gpu_cycles.seconds(heavy, found, card, 160) == pytest.approx(card * 10 * 1024e3 / gpu_cycles.BANDWIDTH)


@pytest.fixture(scope="module")
def wkv6(modules):
    """The machine code of wkv6's kernels."""
    *_, gpu_cycles = modules
    try:
        return gpu_cycles.listing(gpu_cycles.SOURCES[0])
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name, most", [("wkv6_forward_64", 2150), ("wkv6_backward_64", 19_600)])
def test_wkv6_is_as_fast_as_it_is_to_be(modules, wkv6, name, most):
    """By the model, two blocks a multiprocessor: benchmarks/README.md has what they took before."""
    if "release 13.0" not in subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True).stdout:
        pytest.skip("the aims are of the machine code that nvcc 13.0 makes")
    sass, multiprocessor, gpu_cycles = modules
    kernel = next(kernel for kernel in gpu_cycles.KERNELS if kernel.name == name)
    way = sass.Way(sass.read_listing(wkv6, name), kernel.loop)
    assert most / 2 < multiprocessor.cycles(way, kernel.warps, 2, gpu_cycles.TURNS[kernel.tokens]) <= most


def test_the_command_prints_its_tables(modules, wkv6):
    *_, gpu_cycles = modules
    flags = ["--source", str(gpu_cycles.SOURCES[0]), "--kernels", "wkv6_forward_64", "wkv6_forward_g*s_64"]
    done = subprocess.run([*COMMAND, *flags, "--shapes", "1,1024,32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| `wkv6_forward_groups_64` \| 16 \| \d+ \| 1: \d+, 2: \d+, 5: [\d,]+ \|", done.stdout)
    assert re.search(r"\| 1, 1024, 32 \| `wkv6_forward_64` \| 0\.\d+ \| 8 \| 0\.\d+ \| \d\.\d+ \|", done.stdout)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--shapes", "8,4096"], "B,T,H"),
        (["--source", "absent.cu"], "there is no such file"),
        (["--kernels", "wkv5*"], "wkv6_forward_64"),
    ],
)
def test_a_wrong_flag_is_refused(wkv6, flags, message):
    done = subprocess.run([*COMMAND, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
