"""Does the shim notice a missing barrier? Removes each barrier and each wait of the CUDA sources in turn, builds the
rest for the CPU, and compares its results under several orders of the threads with those of the intact source.

    cd tests && python -m cuda_shim.mutate [wkv6] [wkv7] [mix] [bone] [cross_entropy] [decode]

Prints a line for each mutation: `X` for each order that showed it, `.` for each that did not. Exit code 1 if the intact
source differs between orders, or a mutation went unnoticed.
"""

import concurrent.futures
import multiprocessing
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from cuda_shim import shim
from cuda_shim.kernel_cases import RESULTS
from cuda_shim.shim import FAMILIES
from rwkv_peft.ops.native.build import source_directory

MUTATED = re.compile(r"(__syncthreads|__syncwarp|cp_async_wait_all)\(\);")
SECONDS = 60  # for one order's run; a mutated kernel may hang


def main():
    torch.set_num_threads(1)
    families = sys.argv[1:] or list(FAMILIES)
    sources = source_directory("cuda")
    sites = [
        (family, (path.relative_to(sources), m.span(), m.group()))
        for family in families
        for path in sorted((sources / family).glob("*.cuh"))
        for m in MUTATED.finditer(path.read_text())
    ]
    good = True
    with tempfile.TemporaryDirectory() as work, concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [*((family, None) for family in families), *sites]
        results = pool.map(lambda job: examine(sources, Path(work), *job), jobs)
        for (family, site), result in zip(jobs, results):
            expected = ("X" in result) == (site is not None)
            good &= expected
            print(f"{result}  {describe(sources, family, site)}{'' if expected else '   <-- unexpected'}", flush=True)
    print(f"orders: {', '.join(shim.ORDERS)}")
    return 0 if good else 1


def describe(sources, family, site):
    if site is None:
        return f"{family}: nothing removed"
    name, (start, _), text = site
    line = (sources / name).read_text()[:start].count("\n") + 1
    return f"{name}:{line} without {text}"


def examine(sources, work, family, site):
    """A letter for each order: X if the results are wrong or missing, else a dot."""
    folder = Path(tempfile.mkdtemp(dir=work))
    shutil.copytree(sources, folder, dirs_exist_ok=True)
    if site is not None:
        name, (start, end), text = site
        source = (folder / name).read_text()
        (folder / name).write_text(source[:start] + " " * (end - start) + source[end:])
    shim.build(FAMILIES[family], folder, cache=folder)
    letters = ""
    while len(letters) < len(shim.ORDERS):
        letters += run_alone(family, folder, shim.ORDERS[len(letters) :])
    return letters


def run_alone(family, folder, orders):
    """The letters of as many orders as one process survives: a mutated kernel may abort or hang."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=compare, args=(family, folder, orders, sender))
    process.start()
    sender.close()
    letters = ""
    try:
        while len(letters) < len(orders) and receiver.poll(SECONDS):
            letters += receiver.recv()
    except EOFError:
        pass  # it aborted, and counts as noticed
    process.kill()
    process.join()
    return letters if len(letters) == len(orders) else letters + "X"


def compare(family, folder, orders, sender):
    torch.set_num_threads(1)
    kernels, results = FAMILIES[family], RESULTS[family]
    whole, mutated = shim.build(kernels), shim.build(kernels, folder, cache=folder)
    expected = results(whole)
    for order in orders:
        mutated.set_order(order)
        same = all(torch.equal(x, y) for x, y in zip(results(mutated), expected, strict=True))
        sender.send("." if same else "X")


if __name__ == "__main__":
    sys.exit(main())
