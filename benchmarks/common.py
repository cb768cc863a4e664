"""What the benchmarks share: flags with --quick, tables, random models and data, turns, runs of train.py.

Not a program of its own; torch is imported where it is needed, because gpu_check.py runs without.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO = {version: ROOT / "demo" / f"rwkv{version[2]}-demo.pth" for version in ("x060", "x070")}
VERSIONS = tuple(DEMO)
NO_GPU, OUT_OF_MEMORY, NOT_HERE = 2, 3, 4  # exit codes of the programs of gpu_check.py, which have told more


class Parser(argparse.ArgumentParser):
    """Flags of a benchmark, whose docstring is the description. With --quick, its smallest run, they have the defaults
    in `quick`, and none is required."""

    def __init__(self, description, **quick):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.quick = quick
        self.add_argument("--quick", action="store_true", help="the smallest run, in seconds: does it still work?")

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for action in self._actions if "--quick" in args else ():
            if action.dest in self.quick:
                action.default, action.required = self.quick[action.dest], False
                if not action.option_strings and action.nargs is None:
                    action.nargs = "?"
        return super().parse_known_args(args, namespace)


def require(*modules):
    """End the program with a message if Python modules are not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)}: not installed; sh scripts/setup.sh test", file=sys.stderr)
        sys.exit(NOT_HERE)


def tell(**entry):
    """Print a result as a line with a JSON object, in one write, because threads print at once."""
    sys.stdout.write(json.dumps(entry) + "\n")
    sys.stdout.flush()


def peak_gib(device):
    """{"peak_gib"} of torch's allocator on a GPU since reset_peak, nothing on a CPU."""
    import torch

    return {} if device == "cpu" else {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def reset_peak(device):
    import torch

    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def without_room(work, **entry):
    """The exit code of work(), or OUT_OF_MEMORY of a GPU, printed with `entry`, so that the rest may go on."""
    import torch

    try:
        return work() or 0
    except torch.cuda.OutOfMemoryError as error:
        tell(**entry, out_of_memory=str(error).splitlines()[0])
    torch.cuda.empty_cache()
    return OUT_OF_MEMORY


def split(argv):
    """(the arguments before --, those behind it, which are for another command)."""
    return (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])


def row(*cells):
    """Print a line of a table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def head(*columns):
    row(*columns)
    print("|" + "---|" * len(columns), flush=True)


def adapter_of(method, rank):
    """The AdapterConfig of a method by its name, or of a form of Bone."""
    from rwkv_peft.config import AdapterConfig

    word = {"method": method} if method in ("lora", "none") else {"method": "bone", "mode": method}
    return AdapterConfig(**word, rank=rank)


def new_model(version, layers, channels, vocab, adapter=None, **sizes):
    """(a Family, a new random model of it), with an adapter if its AdapterConfig is given."""
    import torch

    from rwkv_peft.adapters.inject import inject
    from rwkv_peft.models import family_named

    torch.manual_seed(0)
    family = family_named(version)
    model = family.build(family.new_dimensions(layers, channels, vocab, **sizes))
    family.init_weights(model)
    if adapter is not None:
        inject(model, adapter, family=family)
    return family, model


def write_model(path, *shape, **sizes):
    """Write a new random model to a file."""
    from rwkv_peft.checkpoints.base import save_model

    save_model(path, new_model(*shape, **sizes)[1].state_dict())


def write_tokens(prefix, vocab, documents, masks=None):
    """Write documents, lists of tokens, as a token file, with a mask of each if they are given."""
    from rwkv_peft.data.token_file_writer import TokenFileWriter

    with TokenFileWriter(prefix, vocab) as writer:
        for number, document in enumerate(documents):
            writer.add(document, masks and masks[number])


def sequences(count, length, modulus=80):
    """So many documents, in which the next token follows from the last."""
    return [[1 + (first + 7 * i) % (modulus - 1) for i in range(length + first)] + [0] for first in range(count)]


def in_turns(steps, rounds, clock=time.process_time):
    """{name: function} -> {name: [seconds of a call, for each round]}; each function is called once in each round, so
    that other work on the machine slows all of them alike. The first calls, which build kernels, do not count."""
    times = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = clock()
            step()
            if number:
                times[name].append(clock() - began)
    return times


def ratio(ours, theirs):
    """The median of the ratios within a round."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def median_ms(times):
    return 1e3 * statistics.median(times)


def resident_peak():
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def saved_bytes(forward, owned):
    """(bytes that autograd keeps for backward besides the tensors `owned`, the result of forward())."""
    import torch

    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    for tensor in owned:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values()), result


def run(*command):
    """Run a script of the repository -> its output; its errors, if it fails, end this process."""
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def train(folder, *flags):
    """Train in a folder -> the run's metrics, a dict of each line."""
    run("train.py", "--proj_dir", folder, "--accelerator", "cpu", "--precision", "fp32", *flags)
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
