"""Attacks writers and runs, time and again, and looks for faults: files that are torn or lost, numbers that differ,
processes that stay, messages that are missing.

    python benchmarks/faults.py                                    every attack (as root, with a tmpfs)
    python benchmarks/faults.py --only "kill -9" --times 40 --seed 7      those with these words, so often
    python benchmarks/faults.py --list                             what each does, and what must hold

An attack is tried under numbers 0, 1, …, which say where it strikes; a trial counts as a hit if the victim was still at
work then. The exit code is 1 if an expectation failed. Offload is left out of what must resume bitwise, because
DeepSpeed's Adam for CPUs computes the powers of its betas anew after a break.
"""

import contextlib
import importlib
import inspect
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from common import Parser, head, row, sequences, write_model, write_tokens

from rwkv_peft.checkpoints.adapter_file import AdapterMetadata, save_adapter
from rwkv_peft.checkpoints.base import open_base, save_model
from rwkv_peft.cli import commands
from rwkv_peft.cli.errors import UserError
from rwkv_peft.data import preprocess
from rwkv_peft.data.binidx import BinidxDataset
from rwkv_peft.release import convert, merge_command
from rwkv_peft.training.ranks.group import LOST
from rwkv_peft.training.saving.checkpoints import list_checkpoints, require_files

REFUSED, FAILED = 2, 3  # exit codes of a process that is forked here: a UserError, anything else
MINUTE, LIMIT = 60, 900  # seconds: in which other ranks end; that a run may take on a machine that others use
LAYER = "blocks.0.att.key"
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
METHODS = {
    "bone": ("--bone_mode", "bone", "--bone_r", "8"),
    "bat-in": ("--bone_mode", "bat-in", "--bone_r", "8"),
    "bat-out": ("--bone_mode", "bat-out", "--bone_r", "8"),
    "lora": ("--peft", "lora", "--lora_config", '{"lora_r": 8}'),
    "pissa": ("--peft", "pissa", "--pissa_config", '{"pissa_r": 8}'),
    "none": ("--peft", "none"),
    "state": ("--peft", "none", "--train_parts", "state"),
}
BONE = METHODS["bat-in"]
SHORT = ("--epoch_steps", "2", "--epoch_count", "3")  # three saves, and the first checkpoint gives way to the third
LONG = ("--epoch_steps", "20", "--epoch_count", "3", "--save_every", "5")
AGAIN = ("--resume", "auto")
NUMBERS = ("step", "epoch", "loss", "lr", "grad_norm", "tokens")


class Outcome(NamedTuple):
    """A run's results: {name: bytes} of its trained tensors, a dict of NUMBERS for each step, names of hidden files."""

    files: dict
    numbers: list
    hidden: list


class Lab:
    """A folder with the victims' inputs, and the faults that were found."""

    def __init__(self, folder, seed):
        self.folder, self.seed, self.rng, self.faults, self.attack = folder, seed, random.Random(seed), [], None
        write_model(folder / "new.pth", "x060", 2, 64, 80)
        older = {key: tensor + 1 for key, tensor in open_base(folder / "new.pth").tensors.items()}
        save_model(folder / "old.pth", older)
        for which in ("old", "new"):
            rows = "".join(f'{{"query": "{which} {i:05}", "response": "{i:05}"}}\n' for i in range(2000))
            (folder / f"{which}.jsonl").write_text(rows)
        write_tokens(folder / "data", 80, sequences(40, 50))
        save_adapter(
            folder / "a.safetensors", {f"{LAYER}.bone": torch.randn(8, 8, 8)}, AdapterMetadata("bat-in", rank=8)
        )

    def expect(self, holds, what, log=None):
        """Note a fault if something that must hold does not."""
        if not holds:
            said = log.read_text(errors="replace").strip().splitlines() if log and log.exists() else []
            self.faults.append(f"{self.attack}: {what}" + (f"; it said last: {said[-1][:300]}" if said else ""))
            print(self.faults[-1], file=sys.stderr, flush=True)

    def start(self, name, *flags, node=0, operation=0, **variables):
        """Fork the first process of a node of a run of train.py in the folder `name`."""
        place = self.folder / name
        inputs = ("--load_model", self.folder / "new.pth", "--data_file", self.folder / "data", "--proj_dir", place)
        fixed = ("--ctx_len", "24", "--lr_init", "1e-2", "--precision", "fp32", "--accelerator", "cpu")
        words = ["train", *map(str, (*inputs, *fixed, *flags))]
        return started(command, words, self.log(name, node), variables, operation=operation, folder=place)

    def log(self, name, node=0):
        return self.folder / f"{name}.{node}"

    def unbroken(self, name, *flags):
        """The Outcome of a run that nobody attacks, which runs only once."""
        if not (self.folder / name).exists():
            assert wait(self.start(name, *flags)) == 0, self.log(name).read_text()
        return self.outcome(name)

    def outcome(self, name):
        place = self.folder / name
        lines = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
        hidden = sorted(path.name for path in place.rglob(".*"))
        return Outcome(trained(place), [{key: line[key] for key in NUMBERS} for line in lines], hidden)

    def newest(self, name):
        """The step of the newest checkpoint, 0 if there is none; expects each to be whole."""
        done = 0
        for checkpoint in list_checkpoints(self.folder / name):
            try:
                state = json.loads((checkpoint / "state.json").read_text())
                require_files(checkpoint, state["files"], fresh_optimizer=False, contents=True)
                done = state["step"]
            except (UserError, ValueError) as error:
                self.expect(False, f"a checkpoint is torn: {error}")
        return done

    def goes_on(self, name, unbroken, *processes):
        """Expect the processes of a resumed run to end well, with the Outcome of the unbroken one."""
        codes = [wait(process) for process in processes]
        self.expect(set(codes) == {0}, f"going on ended with the exit codes {codes}", self.log(name))
        if set(codes) == {0}:
            self.expect(self.outcome(name) == unbroken, "a run that went on ended otherwise")

    def says_once(self, name, node=0, word="error: "):
        """Expect a run to have ended with one message that has the word, and no traceback."""
        said = self.log(name, node).read_text()
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        well = len(errors) == 1 and word in said and "Traceback" not in said
        self.expect(well, f"node {node} did not end with one message", self.log(name, node))


# --- processes


def started(action, *arguments, operation=0, folder=None):
    """Fork a process that calls action(*arguments), whose result is its exit code. It kills itself before its
    `operation`-th change to the files of a folder, counted from 1, if that is not 0."""
    process = os.fork()
    if process:
        return process
    code = 0
    try:
        if operation:
            die_before(operation, folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = action(*arguments) or 0
    except UserError:
        code = REFUSED
    except BaseException:  # whatever it is, it is a fault, and this process must end here
        traceback.print_exc()
        code = FAILED
    os._exit(code)


def die_before(operation, folder):
    """Let this process be killed before so many of Python's changes to the files of a folder: opening one to write,
    renaming, removing, linking, making folders. Writing itself lies between two of them."""
    count, place, to_write = itertools.count(1), os.path.realpath(folder), os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def look(event, arguments):
        changes = event in CHANGES or (event == "open" and arguments[2] & to_write)
        if not changes or isinstance(arguments[0], int):
            return
        path = os.fsdecode(arguments[0])
        if (not os.path.isabs(path) or Path(path).is_relative_to(place)) and next(count) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def command(words, log, variables):
    """Run a command of rwkv-peft in this process, with its output in the file `log` -> its exit code."""
    os.environ.update(variables)
    sys.argv = ["rwkv-peft", *words]
    with open(log, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 1)  # for the processes that it starts
        os.dup2(file.fileno(), 2)
        try:
            commands.run()
        except SystemExit as end:
            return end.code


def is_over(process):
    """True if a process has ended; its exit code can still be read."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(process, seconds=LIMIT):
    """The exit code of a process, which is killed if it takes too long, or minus the signal that ended it."""
    deadline = time.monotonic() + seconds
    while not is_over(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not is_over(process):
        os.kill(process, signal.SIGUSR1)  # an end that no trial takes for its own
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def wait_for_steps(folder, steps, process):
    """Wait until a run has taken so many steps -> True, or has ended."""
    path = folder / "metrics.jsonl"
    while not is_over(process):
        if path.exists() and path.read_text().count("\n") >= steps:
            return True
        time.sleep(0.005)
    return False


def trained(folder):
    """{name: bytes} of the newest files of trained tensors in a run's folder, and of each epoch."""
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if path.suffix in (".safetensors", ".pth")}


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def small_disk(folder):
    """Mount a tmpfs of 8 MiB at a new folder; yields whether that worked, which needs root."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    works = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield works
    finally:
        if works:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, room=0):
    """Fill a disk but for so many bytes."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:  # it is full
            file.truncate(max(0, file.tell() - room))


# --- attacks on writers, each of which writes over an earlier output


def save_trained(inputs, which, output):
    weight = open_base(inputs / f"{which}.pth").tensors[f"{LAYER}.weight"]
    save_adapter(output / "a.safetensors", {f"{LAYER}.weight": weight}, AdapterMetadata("none"))


def save_base(inputs, which, output):
    save_model(output / "model.pth", open_base(inputs / f"{which}.pth").tensors)


def merge(inputs, which, output):
    flags = ["--base_model", inputs / f"{which}.pth", "--bone_checkpoint", inputs / "a.safetensors", "--any_base"]
    merge_command.main([*map(str, flags), "--output", str(output / "merged.pth")])


def convert_to_st(inputs, which, output):
    convert.main([str(inputs / f"{which}.pth"), str(output / "model.st")])


def make_tokens(inputs, which, output):
    words = ["--tokenizer", "bytes", "--overwrite"]
    preprocess.main([str(inputs / f"{which}.jsonl"), "--output", str(output / "data"), *words])


WRITERS = (save_trained, save_base, merge, convert_to_st, make_tokens)


class Trial:
    """One writer in a folder with its old output; wanted: {"old" and "new": the files of an output}."""

    known = {}  # noqa: RUF012 - {(lab's folder, writer): the outputs}, once for all trials

    def __init__(self, lab, number):
        self.lab, self.writer = lab, WRITERS[number % len(WRITERS)]
        self.output = lab.folder / "written"
        key = lab.folder, self.writer
        if key not in self.known:
            self.known[key] = {}
            for which in ("old", "new"):
                self.renew({})
                assert wait(self.start(which)) == 0
                self.known[key][which] = content(self.output)
        self.wanted = self.known[key]
        self.renew(self.wanted["old"])

    def renew(self, files):
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir(parents=True)
        for name, data in files.items():
            (self.output / name).write_bytes(data)

    def start(self, which, operation=0):
        arguments = self.lab.folder, which, self.output
        return started(self.writer, *arguments, operation=operation, folder=self.output)

    def expect(self, holds, what):
        self.lab.expect(holds, f"{self.writer.__name__}: {what}")

    def ends(self, process):
        """Judge a writer that was killed, and the next one -> True if it was still at work."""
        hit = wait(process) == -signal.SIGKILL
        seen = {name: data for name, data in content(self.output).items() if not name.startswith(".")}
        whole = seen in self.wanted.values()
        if not whole and self.writer is make_tokens:
            with contextlib.suppress(UserError):
                BinidxDataset(self.output / "data")
                self.expect(False, "a kill left a set that is read, and is neither output")
            whole = True
        self.expect(whole, "a kill left neither the old output nor the new one")
        self.expect(wait(self.start("new")) == 0, "the next writer failed")
        self.expect(content(self.output) == self.wanted["new"], "the next writer left something else")
        return hit


def kill_writer_at(lab, number):
    """Kill a writer before one of its changes to files. Its output is the old one or the new one, or a set of tokens
    that is refused; the next writer leaves the new output and nothing else."""
    trial = Trial(lab, number)
    return trial.ends(trial.start("new", 1 + number // len(WRITERS)))


def race(lab, number):
    """Let two writers write at once. The output is that of one; the other may refuse."""
    trial = Trial(lab, number)
    codes = [wait(process) for process in [trial.start(which) for which in ("old", "new")]]
    trial.expect(0 in codes and set(codes) <= {0, REFUSED}, f"of two at once the exit codes were {codes}")
    trial.expect(content(trial.output) in trial.wanted.values(), "two at once left what neither wrote")
    return True


def fill_disk_of_writer(lab, number):
    """Let a writer work on a full disk. It refuses in words, and the old output stays."""
    with small_disk(lab.folder / f"writers-disk-{number}") as works:
        if not works:
            return False
        trial = Trial(lab, number)
        trial.output = lab.folder / f"writers-disk-{number}" / "output"
        trial.renew(trial.wanted["old"])
        fill(trial.output.parent)
        code = wait(trial.start("new"))
        trial.expect(code == REFUSED, f"on a full disk the exit code was {code}")
        trial.expect(content(trial.output) == trial.wanted["old"], "on a full disk something else was left")
    return True


# --- attacks on runs of train.py


def kill_run_at(lab, number, *more):
    """Kill a run before one of its changes to files: before, while and after it saves. No checkpoint is torn, no file
    is that of no epoch, and --resume auto ends with the bits of an unbroken run."""
    flags = (*BONE, *SHORT, *more)
    unbroken = lab.unbroken("-".join(("saves", *more)), *flags)
    whole = set(lab.unbroken("saves", *BONE, *SHORT).files.values())
    name = f"{'-'.join(('killed', *more))}-{number}"
    hit = wait(lab.start(name, *flags, *AGAIN, operation=1 + number)) == -signal.SIGKILL
    if hit:
        lab.newest(name)
        lab.expect(set(trained(lab.folder / name).values()) <= whole, "a file is torn")
        lab.goes_on(name, unbroken, lab.start(name, *flags, *AGAIN))
    shutil.rmtree(lab.folder / name, ignore_errors=True)
    return hit


def kill_run_that_discards_at(lab, number):
    """The same for a run that keeps one checkpoint."""
    return kill_run_at(lab, number, "--keep_checkpoints", "1")


def stop_and_resume(lab, number):
    """Kill a run, or ask it to stop, where a save begins, under each method, ZeRO stage and number of ranks. --resume
    auto ends with the bits of an unbroken run."""
    shift, place, ranks = number // 14 % 3, number // 2 % 7, 1 + number % 2
    method, stage = [*METHODS][place], (shift + place + ranks) % 3 + 1
    sent = (signal.SIGKILL, signal.SIGTERM)[(shift + place) % 2]
    name = f"{method}-stage-{stage}-ranks-{ranks}-{number}"
    flags = (*METHODS[method], *LONG, "--strategy", f"deepspeed_stage_{stage}", "--devices", str(ranks))
    unbroken = lab.unbroken(f"{name}-unbroken", *flags)
    process = lab.start(name, *flags)
    wait_for_steps(lab.folder / name, 25, process)
    time.sleep(lab.rng.uniform(0, 0.05))
    os.kill(process, sent)
    code = wait(process)
    stopped = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[sent]
    lab.expect(code in (0, stopped), f"{sent.name} ended {name} with exit code {code}", lab.log(name))
    if code == stopped:
        lab.goes_on(name, unbroken, lab.start(name, *flags, *AGAIN))
    return code == stopped


def fill_disk_of_run(lab, number):
    """Leave of a run's disk a part of what a save takes, before its first checkpoint or after it. It ends in one
    message, with the checkpoint that it had; with room again, it ends with the bits of an unbroken run, or refuses to
    write over tensors of no checkpoint."""
    flags, name = (*BONE, *LONG), f"disk-{number}"
    unbroken, whole = lab.unbroken("disks", *flags), lab.folder / "disks"
    took = [path for path in (*list_checkpoints(whole)[-1].rglob("*"), whole / "adapter.safetensors") if path.is_file()]
    room = int((number // 2 % 6) / 6 * sum(-(-path.stat().st_size // 4096) + 2 for path in took)) * 4096
    folder = lab.folder / name
    with small_disk(folder) as works:
        if not works:
            return False
        process = lab.start(name, *flags)
        wait_for_steps(folder, 7 if number % 2 else 2, process)
        os.kill(process, signal.SIGSTOP)
        before = lab.newest(name)
        fill(folder, room)
        os.kill(process, signal.SIGCONT)
        code, files = wait(process), trained(folder)
        (folder / "filler").unlink()
        if code == 0:
            return False
        lab.expect(code == REFUSED, f"it ended with exit code {code}")
        lab.says_once(name, word="cannot write ")
        after = lab.newest(name)
        lab.expect(after >= before, "the checkpoint that it had is gone")
        again = lab.start(name, *flags, *AGAIN)
        if after or not files:
            lab.goes_on(name, unbroken, again)
        else:
            kept = wait(again) == REFUSED and trained(folder) == files
            lab.expect(kept, "trained tensors of no checkpoint are overwritten")
    return True


def start_nodes(lab, name, nodes, *more):
    """The first processes of a run of two ranks, on one node or on two."""
    flags = (*BONE, *LONG, "--strategy", "deepspeed_stage_2", *more)
    if nodes == 1:
        return [lab.start(name, *flags, "--devices", "2")]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = range(2)
    return [lab.start(name, *flags, "--num_nodes", "2", node=n, NODE_RANK=str(n), **meeting) for n in places]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def kill_rank(lab, number):
    """Kill rank 1, the main process, or a node of two, before the first checkpoint or after it. The others end within a
    minute, each node with one message and no process left, and the run goes on to the bits of an unbroken one."""
    steps, (nodes, victim) = (3, 25)[number % 2], ((1, "rank"), (1, 0), (2, 1), (2, 0))[number // 2 % 4]
    name = f"ranks-{number}"
    whole = lab.unbroken("two-ranks", *BONE, *LONG, "--strategy", "deepspeed_stage_2", "--devices", "2")
    mains = start_nodes(lab, name, nodes, *AGAIN)
    if not wait_for_steps(lab.folder / name, steps, mains[0]):
        lab.expect(False, f"{name} ended before it could be killed", lab.log(name))
        return False
    children = [child for main in mains for child in psutil.Process(main).children()]
    others = [main for place, main in enumerate(mains) if place != victim]
    os.kill(children[0].pid if victim == "rank" else mains[victim], signal.SIGKILL)
    codes = [wait(main, MINUTE) for main in others]
    lab.expect(set(codes) <= {1, LOST}, f"the others of {name} ended with the exit codes {codes}", lab.log(name))
    _, left = psutil.wait_procs(children, MINUTE)
    lab.expect(not left, f"{len(left)} processes of {name} were left")
    if victim != "rank":
        wait(mains[victim])
    for place in [mains.index(main) for main in others] or [0]:
        lab.says_once(name, place, "--resume")
    lab.goes_on(name, whole, *start_nodes(lab, name, nodes, *AGAIN))
    return True


class Attack(NamedTuple):
    """strike(lab, number) -> True if it hit; its docstring says what it does and what must hold. It is tried under
    `numbers`, with --quick under those of `quick`."""

    name: str
    strike: Callable
    numbers: Iterable
    quick: Iterable = ()


ATTACKS = (
    Attack("kill -9 of a writer before a change", kill_writer_at, range(360), range(0, 42, 7)),
    Attack("two writers at once", race, range(40), range(6)),
    Attack("a writer's full disk", fill_disk_of_writer, range(6), range(1)),
    Attack("kill -9 of a run before a change", kill_run_at, range(0, 200, 6)),
    Attack("kill -9 of a run, --keep_checkpoints 1", kill_run_that_discards_at, range(0, 200, 19)),
    Attack("a run is stopped", stop_and_resume, range(14)),
    Attack("a run's full disk", fill_disk_of_run, range(12)),
    Attack("kill -9 of a rank or node", kill_rank, range(8)),
)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--only", default="", metavar="WORDS", help="attacks with these words in their names")
    parser.add_argument("--times", type=int, help="so many trials of each, under the numbers 0, 1, …")
    parser.add_argument("--list", action="store_true", help="what each attack does, and what must hold")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    chosen = [attack for attack in ATTACKS if args.only in attack.name]
    if args.list:
        print(*(f"{each.name}\n    {inspect.getdoc(each.strike)}\n" for each in chosen), sep="\n")
        return 0
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ("run", "zero"):  # once, for all that is forked from here
        importlib.import_module(f"rwkv_peft.training.{name}")
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), args.seed)
        head("attack", "trials", "that hit", "faults")
        for attack in chosen:
            before, lab.attack = len(lab.faults), attack.name
            numbers = attack.quick if args.quick else attack.numbers if args.times is None else range(args.times)
            hits = [attack.strike(lab, number) for number in numbers]
            row(attack.name, len(hits), sum(hits), len(lab.faults) - before)
    print(*lab.faults, sep="\n", end="\n" * bool(lab.faults))
    return int(bool(lab.faults))


if __name__ == "__main__":
    sys.exit(main())
