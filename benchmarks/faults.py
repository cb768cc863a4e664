"""What is left where writers are killed, race or meet a full disk, and what broken files do to readers.

    python benchmarks/faults.py --kills 100 --races 40 --mutants 2000 --seed 1

Each writer (an adapter and a model saved, a merge, a conversion, preprocessing) writes over an earlier output. One that
is killed, at a moment drawn from the time that it takes, must leave the earlier output or the new one, or for token
files one that is refused; the next must end well, with the new output and nothing else in the folder. Of two at once
the output must be that of one. On a full disk (a tmpfs, where root can mount one) it must say so and change nothing.
Mutants are those of tests/fuzz under other seeds. Prints counts; the exit code is 1 where one of these did not hold.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from rwkv_peft.data import preprocess
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.errors import UserError
from rwkv_peft.files.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.files.base import open_base, save_model
from rwkv_peft.models import family_named
from rwkv_peft.release import convert, merge_command

ROOT = Path(__file__).resolve().parents[1]
LAYER = "blocks.0.att.key"
SLOWEST = 20  # seconds that a reader may take over a broken file
REFUSED, FAILED = 2, 3  # exit codes of a writer: a UserError, anything else


@dataclass(frozen=True)
class Writer:
    """write(inputs, which, output) writes version `which` ("old" or "new") of its output into the folder `output`."""

    name: str
    write: object
    may_refuse: bool = False  # whether a kill may leave a set that its reader refuses


def save_trained(inputs, which, output):
    base = open_base(inputs / f"{which}.pth")
    save_adapter(
        output / "a.safetensors", {f"{LAYER}.weight": base.tensors[f"{LAYER}.weight"]}, AdapterMetadata("none")
    )


def save_base(inputs, which, output):
    save_model(output / "model.pth", open_base(inputs / f"{which}.pth").tensors)


def merge(inputs, which, output):
    flags = ["--base_model", inputs / f"{which}.pth", "--bone_checkpoint", inputs / "a.safetensors", "--any_base"]
    merge_command.main([*map(str, flags), "--output", str(output / "merged.pth")])


def convert_to_st(inputs, which, output):
    convert.main([str(inputs / f"{which}.pth"), str(output / "model.st")])


def make_tokens(inputs, which, output, *flags):
    words = ["--tokenizer", "bytes", "--workers", "1", *flags]
    preprocess.main([str(inputs / f"{which}.jsonl"), "--output", str(output / "data"), *words])


def make_shuffled(inputs, which, output):
    make_tokens(inputs, which, output, "--shuffle", "1")


WRITERS = (
    Writer("save an adapter", save_trained),
    Writer("save a model", save_base),
    Writer("merge", merge),
    Writer("convert", convert_to_st),
    Writer("preprocess", make_tokens, may_refuse=True),
    Writer("preprocess --shuffle", make_shuffled, may_refuse=True),
)


def make_inputs(folder):
    """Two versions, of equal sizes, of what the writers read."""
    family = family_named("x060")
    for seed, which in enumerate(("old", "new")):
        torch.manual_seed(seed)
        model = family.build(family.new_dimensions(2, 64, 4000))
        family.init_weights(model)
        save_model(folder / f"{which}.pth", model.state_dict())
        rows = "".join(f'{{"query": "{which} {i:05}", "response": "{i:05}"}}\n' for i in range(4000))
        (folder / f"{which}.jsonl").write_text(rows)
    torch.manual_seed(2)
    bone = {f"{LAYER}.bone": torch.randn(8, 8, 8)}
    save_adapter(folder / "a.safetensors", bone, AdapterMetadata("bat-in", rank=8))


def started(writer, inputs, which, output):
    """The process, forked from this one, that writes."""
    process = os.fork()
    if process:
        return process
    code = 0
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            writer.write(inputs, which, output)
    except UserError:
        code = REFUSED
    except BaseException:  # whatever it is, it is a fault, and this process must end here
        traceback.print_exc()
        code = FAILED
    os._exit(code)


def ended(process):
    """The exit code of a process; below 0 the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(folder):
    """{name: bytes} of a folder's files, hidden ones among them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shown(files):
    """Those of {name: bytes} that a user sees."""
    return {name: data for name, data in files.items() if not name.startswith(".")}


class Trials:
    """Runs of one Writer in a folder of its own, beside the two outputs that it may leave there."""

    def __init__(self, writer, inputs, folder, rng):
        self.writer, self.inputs, self.rng = writer, inputs, rng
        self.output = folder / "output"
        self.wanted, self.faults, self.left, self.seconds = {}, [], 0, 0.0
        for which in ("old", "new"):
            self.renew()
            began = time.perf_counter()
            assert ended(self.started(which)) == 0
            self.seconds = time.perf_counter() - began
            self.wanted[which] = content(self.output)

    def renew(self):
        """An output folder as before a trial: with the old output, where that is known."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir(parents=True)
        for name, data in self.wanted.get("old", {}).items():
            (self.output / name).write_bytes(data)

    def started(self, which):
        return started(self.writer, self.inputs, which, self.output)

    def expect(self, holds, what):
        if not holds:
            self.faults.append(f"{self.writer.name}: {what}")

    def is_whole(self, files):
        """Whether the files are one of the outputs, or a set that its reader refuses."""
        if files in self.wanted.values():
            return True
        try:
            BinidxDataset(self.output / "data")
        except UserError:
            return self.writer.may_refuse
        return False

    def kill(self):
        self.renew()
        process = self.started("new")
        time.sleep(self.rng.uniform(0, 0.8 * self.seconds))
        os.kill(process, signal.SIGKILL)
        killed = ended(process) == -signal.SIGKILL
        files = content(self.output)
        self.left += files != shown(files)
        self.expect(self.is_whole(shown(files)), "a kill left neither the old output nor the new one")
        self.expect(ended(self.started("new")) == 0, "the next writer failed")
        self.expect(content(self.output) == self.wanted["new"], "the next writer left something else")
        return killed

    def race(self):
        self.renew()
        codes = [ended(process) for process in [self.started(which) for which in ("old", "new")]]
        self.expect(0 in codes and set(codes) <= {0, REFUSED}, f"of two at once the exit codes were {codes}")
        self.expect(content(self.output) in self.wanted.values(), "two at once left what neither wrote")

    def fill(self, mount):
        """On a full disk, over an old output."""
        place, self.output = self.output, mount / "output"
        self.renew()
        with open(mount / "rest", "wb", buffering=0) as file, contextlib.suppress(OSError):  # until it is full
            while True:
                file.write(bytes(4096))
        code = ended(self.started("new"))
        self.expect(code == REFUSED, f"on a full disk the exit code was {code}")
        self.expect(content(self.output) == self.wanted["old"], "on a full disk something else was left")
        (mount / "rest").unlink()
        shutil.rmtree(self.output)
        self.output = place


def mounted(folder):
    """Whether a small tmpfs could be mounted at `folder`, made for it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def try_mutants(count, seed, folder):
    """(how many mutants of tests/fuzz were tried, (seconds, name) of the slowest, the faults)."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest
    from fuzz import specimens
    from fuzz.test_broken_files import broken

    with contextlib.redirect_stdout(io.StringIO()):
        specimens.write_all(folder, conftest.make_tiny_state(1, 16, None, 16, 8, 257, 2, 2))
    warnings.simplefilter("ignore")  # of torch, on the tensors that a mutation makes
    here = [specimen for specimen in specimens.SPECIMENS if (folder / specimen.file).exists()]
    others = {item.file: (folder / item.file).read_bytes() for item in here}
    faults, tried, slowest = [], 0, (0.0, "")
    for specimen in here:
        for number in range(seed * count, seed * count + count // len(here)):
            what, data = broken(specimen, number, others)
            (folder / specimen.file).write_bytes(data)
            began, tried = time.perf_counter(), tried + 1
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                try:
                    specimen.use(folder)
                except UserError:
                    pass  # which is what a broken file is to end in
                except Exception as error:  # whatever it is, it is a fault
                    faults.append(f"{specimen.file}, mutant {number}, {what}: {type(error).__name__}: {error}")
            slowest = max(slowest, (time.perf_counter() - began, f"{specimen.file}, mutant {number}, {what}"))
        (folder / specimen.file).write_bytes(others[specimen.file])
    if slowest[0] > SLOWEST:
        faults.append(f"{slowest[1]}: {slowest[0]:.0f} s")
    return tried, slowest, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="over all writers")
    parser.add_argument("--races", type=int, default=40, help="over all writers")
    parser.add_argument("--mutants", type=int, default=0, help="over all readers")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, faults = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_inputs(folder)
        disk = mounted(folder / "disk")
        print("| writer | kills that hit | with leftovers | races | full disk | faults |")
        print("|---|---|---|---|---|---|")
        try:
            for place, writer in enumerate(WRITERS):
                trials = Trials(writer, folder, folder / writer.name, rng)
                hits = sum(trials.kill() for _ in range(place, args.kills, len(WRITERS)))
                races = len([trials.race() for _ in range(place, args.races, len(WRITERS))])
                if disk:
                    trials.fill(folder / "disk")
                row = (hits, trials.left, races, "told" if disk else "not tried", len(trials.faults))
                print(f"| {writer.name} |", " | ".join(map(str, row)), "|", flush=True)
                faults += trials.faults
        finally:
            if disk:
                subprocess.run(["umount", str(folder / "disk")], check=True)
        if args.mutants:
            (folder / "fuzz").mkdir()
            tried, slowest, found = try_mutants(args.mutants, args.seed, folder / "fuzz")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            print(f"{tried} broken files, {len(found)} faults, peak memory {peak} MiB")
            print(f"the slowest: {slowest[0]:.1f} s, {slowest[1]}")
            faults += found
    print(*faults, sep="\n", end="\n" * bool(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
