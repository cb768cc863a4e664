"""The cycles of the chunked recurrence kernels on an H100, read off their machine code: no GPU is needed, but nvcc and
CUDA's disassemblers (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, which requirements-test.txt does).

    python benchmarks/gpu_cycles.py [--kernels 'wkv6_*_64' …] [--source FILE.cu] [--shapes 8,4096,32 …]

The first table has the cycles of a chunk of 16 tokens, or of 64 where a kernel goes by segments, when so many blocks
share a multiprocessor; the second what follows for whole sequences, and for sequences split into groups of tokens. A
time is the longer of the model's (benchmarks/multiprocessor.py says what it leaves out) and of the traffic's. --source
reads other sources that have kernels of these names, as those of another commit's checkout.
"""

import argparse
import importlib.util
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from multiprocessor import cycles
from sass import Loop, Way, read_listing

from rwkv_peft.errors import UserError
from rwkv_peft.ops.native.compilers import find_nvcc, find_program
from rwkv_peft.ops.native.errors import BuildError
from rwkv_peft.ops.recurrence.groups import choose_group

CUDA = Path(__file__).resolve().parents[1] / "cuda"
SOURCES = (CUDA / "wkv6" / "wkv6.cu", CUDA / "wkv7" / "wkv7.cu")
DISASSEMBLERS = "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or put the CUDA toolkit's bin folder on PATH"
ARCHITECTURE = "sm_90"
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.0e12
LAUNCH = 3e-6  # seconds of each launch but the first
SHAPES = ((8, 4096, 32), (1, 4096, 64), (1, 1024, 32))
CHUNK, SEGMENT = 16, 64
TURNS = {CHUNK: 16, SEGMENT: 4}  # that the model runs; the second half counts


@dataclass(frozen=True)
class Kernel:
    """tokens: of a turn of its loop; moves: KB of memory's traffic that these are; fits: blocks that share a
    multiprocessor, the last as many as it holds."""

    name: str
    tokens: int
    moves: float
    fits: tuple[int, ...]
    loop: Loop = Loop()
    warps: int = 4
    head_size: int = 64


KEPT = Loop(keeps=4)  # every fourth chunk's state is stored
LOW, LOW_128 = Loop((1,), near=1, keeps=4), Loop((2,), near=1, keeps=4)  # `low` is every head's, and copied by a loop
VISITS = (3, 4)  # of a segment's chunks: to make their states, and for the gradients
# One warp inverts a matrix, one of those that make operands where half of a block's warps do. With None: what all do.
INVERTS = Loop(lone=(0,))
HALVES = Loop(helpers=4, lone=(4,))
MEASURED = Loop(helpers=4, lone=(None, 4))
GROUPS = Loop(helpers=4, lone=(None, 4, 5))
KERNELS = (
    Kernel("wkv6_forward_64", CHUNK, 12, (1, 2, 5), KEPT),
    Kernel("wkv6_forward_gated_64", CHUNK, 16, (1, 2, 5), KEPT),
    Kernel("wkv6_forward_gated_64_decay_64", CHUNK, 14, (1, 2, 4), LOW),
    Kernel("wkv6_forward_gated_64_decay_128", CHUNK, 14, (1, 2, 3), LOW_128),
    Kernel("wkv6_forward_128", CHUNK, 28, (1, 2), KEPT, warps=8, head_size=128),
    Kernel("wkv6_backward_64", SEGMENT, 80, (1, 2, 3), Loop(VISITS)),
    Kernel("wkv6_backward_gated_64", SEGMENT, 104, (1, 2, 3), Loop(VISITS)),
    Kernel("wkv6_backward_gated_64_decay_64", SEGMENT, 96, (1, 2, 3), Loop((4, *VISITS), near=1)),
    Kernel("wkv6_backward_gated_64_decay_128", SEGMENT, 96, (1, 2, 3), Loop((8, *VISITS), near=1)),
    Kernel("wkv6_backward_128", SEGMENT, 176, (1,), Loop(VISITS), warps=8, head_size=128),
    Kernel("wkv6_forward_groups_64", CHUNK, 6, (1, 2, 5)),
    Kernel("wkv6_backward_groups_64", CHUNK, 6, (1, 2, 5)),
    Kernel("wkv6_forward_groups_128", CHUNK, 12, (1, 2), warps=8, head_size=128),
    Kernel("wkv6_backward_groups_128", CHUNK, 12, (1, 2), warps=8, head_size=128),
    Kernel("wkv7_forward_64", CHUNK, 22, (1, 2), HALVES, warps=8),
    Kernel("wkv7_forward_keys_64", CHUNK, 20, (1, 2), MEASURED, warps=8),
    Kernel("wkv7_backward_64", CHUNK, 35, (1, 2, 3), INVERTS),
    Kernel("wkv7_backward_keys_64", CHUNK, 31, (1, 2, 3), INVERTS),
    Kernel("wkv7_forward_groups_64", CHUNK, 10, (1, 2), GROUPS, warps=8),
    Kernel("wkv7_forward_groups_keys_64", CHUNK, 8, (1, 2), MEASURED, warps=8),
    Kernel("wkv7_backward_groups_64", CHUNK, 10, (1, 2), GROUPS, warps=8),
    Kernel("wkv7_backward_groups_keys_64", CHUNK, 9, (1, 2), MEASURED, warps=8),
)
# The kernels whose times are told, and the passes over groups that come before them where time is split.
PAIRS = {
    "wkv6_forward_64": "wkv6_forward_groups_64",
    "wkv6_backward_64": "wkv6_backward_groups_64",
    "wkv7_forward_keys_64": "wkv7_forward_groups_keys_64",
    "wkv7_backward_keys_64": "wkv7_backward_groups_keys_64",
}


def find_disassembler() -> str:
    """cuobjdump's path, of the wheel that is installed or of a toolkit; BuildError where there is none."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations or [] if spec else []
    wheels = [str(path) for folder in folders for path in sorted(Path(folder).glob("*/bin/cuobjdump"))]
    return find_program(*wheels, "cuobjdump", remedy=DISASSEMBLERS)


def listing(source: Path) -> str:
    """The machine code that nvcc makes of a CUDA source. UserError for one that it does not compile, BuildError where a
    program is missing."""
    nvcc, cuobjdump = find_nvcc(), find_disassembler()
    if not source.is_file():
        raise UserError(f"--source {source}: there is no such file")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.cubin"
        includes = [f"-I{source.parent}", f"-I{source.parent.parent}"]
        command = [nvcc, "-std=c++17", "-O3", f"-arch={ARCHITECTURE}", *includes, "-cubin"]
        compiled = subprocess.run([*command, "-o", str(made), str(source)], capture_output=True, text=True)
        if compiled.returncode:
            raise UserError(f"--source {source}: nvcc does not compile it:\n{compiled.stderr.strip()}")
        return subprocess.run([cuobjdump, "-sass", str(made)], capture_output=True, text=True, check=True).stdout


def cycles_of(text: str, kernel: Kernel) -> dict[int, float]:
    """Blocks that share a multiprocessor -> cycles of a turn; KeyError where the listing has no such kernel."""
    way = Way(read_listing(text, kernel.name), kernel.loop)
    return {blocks: cycles(way, kernel.warps, blocks, TURNS[kernel.tokens]) for blocks in kernel.fits}


def seconds(kernel: Kernel, found: dict[int, float], blocks: int, tokens: int) -> float:
    """What `blocks` blocks of `tokens` tokens each take on the whole card; for a number that share a multiprocessor of
    which there is no figure, what lies between its neighbours'."""
    turns, share = tokens / kernel.tokens, blocks / MULTIPROCESSORS
    rounds = math.ceil(share / kernel.fits[-1])
    together = math.ceil(share / rounds)
    below = max(fits for fits in kernel.fits if fits <= together)
    above = min(fits for fits in kernel.fits if fits >= together)
    part = (together - below) / (above - below) if above > below else 0
    a_turn = found[below] + part * (found[above] - found[below])
    return max(rounds * turns * a_turn / CLOCK, blocks * turns * kernel.moves * 1024 / BANDWIDTH)


def split_seconds(
    kernel: Kernel, passing: Kernel, found: dict[str, dict[int, float]], shape: tuple[int, int, int], group: int
) -> float:
    """The same where time is split into groups of `group` tokens: the pass over groups, the scan of their states, and
    the kernel over each group."""
    B, T, H = shape
    groups = B * H * math.ceil(T / group)
    scan = 2 * groups * kernel.head_size**2 * 4 / BANDWIDTH
    passes = seconds(passing, found[passing.name], groups, group)
    return passes + scan + seconds(kernel, found[kernel.name], groups, group) + 2 * LAUNCH


def rows(found: dict[str, dict[int, float]], shapes: Iterable[tuple[int, int, int]]) -> Iterator[str]:
    """The table of times."""
    kernels = {kernel.name: kernel for kernel in KERNELS}
    yield "| B, T, H | kernel | whole, ms | groups | split, ms | ratio |\n|---|---|---|---|---|---|"
    for B, T, H in shapes:
        for name, passing in PAIRS.items():
            if name not in found:
                continue
            whole = seconds(kernels[name], found[name], B * H, T)
            group = choose_group(B, T, H, B, 2 * MULTIPROCESSORS) if passing in found else 0
            split = split_seconds(kernels[name], kernels[passing], found, (B, T, H), group) if group else 0
            end = f"{math.ceil(T / group)} | {split * 1e3:.3f} | {whole / split:.2f}" if group else "| |"
            yield f"| {B}, {T}, {H} | `{name}` | {whole * 1e3:.3f} | {end} |"


def shape_of(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: B,T,H is due, three whole numbers from 1 on")
    return shape


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kernels", nargs="+", default=["*"], metavar="NAME", help="patterns of names (all)")
    parser.add_argument("--source", nargs="+", type=Path, default=SOURCES, help="CUDA sources (cuda/wkv6, cuda/wkv7)")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, metavar="B,T,H")
    args = parser.parse_args()
    named = [kernel for kernel in KERNELS if any(fnmatch(kernel.name, pattern) for pattern in args.kernels)]
    try:
        if not named:
            names = ", ".join(kernel.name for kernel in KERNELS)
            raise UserError(f"--kernels {' '.join(args.kernels)}: none is such; there are {names}")
        text = "".join(listing(source.resolve()) for source in args.source)
    except (BuildError, UserError) as error:
        print(f"gpu_cycles.py: {error}", file=sys.stderr)
        return 2
    wanted = [kernel for kernel in named if f"Function : {kernel.name}\n" in text]
    found = {}
    print("| kernel | tokens | instructions a warp | cycles, by blocks a multiprocessor |\n|---|---|---|---|")
    with ProcessPoolExecutor() as pool:
        for kernel, each in zip(wanted, pool.map(cycles_of, [text] * len(wanted), wanted)):
            found[kernel.name] = each
            length = len(Way(read_listing(text, kernel.name), kernel.loop).turn(0, 1))
            told = ", ".join(f"{blocks}: {value:,.0f}" for blocks, value in each.items())
            print(f"| `{kernel.name}` | {kernel.tokens} | {length:,} | {told} |", flush=True)
    print("\n" + "\n".join(rows(found, args.shapes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
