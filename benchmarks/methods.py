"""Compares adapter methods, each at its own best learning rate and with about as many trained parameters.

    python benchmarks/methods.py --methods bat-in bone lora pissa --rank 64 --steps 1000 --output out/methods -- \\
        --load_model base.pth --data_file data/mine --val_split 0.01 --ctx_len 1024 --micro_bsz 8
    python demo/task.py finetune --documents 4000 --seed 1 --output out/finetune.jsonl
    python benchmarks/methods.py --rows out/finetune.jsonl --rank 16 --steps 200             (the demo's base and task)
    python benchmarks/methods.py --model rwkv6-tiny-1m-bf16.pth --rows gsm8k/train.jsonl --template question --utf16 \\
        --rank 8 --rates 1e-3 3e-3 1e-2 --steps 200 --val_every 40

The flags after -- are train.py's, the same for all runs. Each method sweeps the learning rate on a grid of 1 and 3
times the powers of ten with the first seed, until its best rate lies between two worse ones, and repeats that with
the other seeds. --rank is the first method's; the others take the rank with the nearest number of parameters. Runs
are in OUTPUT/runs; OUTPUT gets results.jsonl, a line for each complete run, table.md and rates.png. The same command
goes on after the complete runs; other settings want another folder. With --retain_data PREFIX after -- the table also
has the loss on that data and its rise: how much each method forgets.

--rows makes the data, of --model: rows are laid out as by rwkv-peft preprocess, or by --template; every token counts,
and the last --held_out rows are the validation data. Tokens are the bytes of UTF-8 and an end token (the demo's
vocabulary), or with --utf16 the bytes of UTF-16, on which the tiny models of rwkv.cpp's tests were trained.
--retain_text is the text whose first --retain_chars characters are train.py's --retain_data. With --quick, bone on
the demo's rows.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import DEMO, ROOT, Parser, run, split, write_tokens

from rwkv_peft.cli.errors import exit_on_user_error
from rwkv_peft.config import WORDS, AdapterConfig, forms
from rwkv_peft.data.chat import TURN_END
from rwkv_peft.data.encoding import parse
from rwkv_peft.data.layouts import RowLayout, Template, read_template
from rwkv_peft.data.rows import read_rows
from rwkv_peft.data.tokenizer import BytesTokenizer
from rwkv_peft.plots import look, new_figure, plain_axes, read_metrics, save_figure, series
from rwkv_peft.training.estimate.activations import METHODS
from rwkv_peft.training.estimate.memory import count
from rwkv_peft.training.flags.request import parse_run
from rwkv_peft.training.rates import automatic_rate
from rwkv_peft.training.saving.checkpoints import DIVERGED

GRID = tuple(float(f"{digit}e{decade}") for decade in range(-8, 2) for digit in (1, 3))
RANKLESS = {"full": ["--peft", "none"], "state": ["--peft", "none", "--train_parts", "state"]}
SMALL = (
    "--ctx_len 256 --micro_bsz 2 --precision fp32 --warmup_steps 10".split()
)  # with --rows, before the further flags
QUICK = {"methods": ["bone"], "rank": 8, "rates": [0.1], "seeds": [1], "steps": 2, "output": None, "held_out": 2}


class Cell(NamedTuple):
    """A run: its method, learning rate and seed."""

    method: str
    rate: float
    seed: int


class Size(NamedTuple):
    """A method's (rank, mini_rank), 0 for none, and the number of parameters that train."""

    ranks: tuple[int, int]
    trained: int


def main(argv):
    own, train = split(argv)
    parser = Parser(__doc__, **QUICK)
    add = parser.add_argument
    add("--methods", nargs="+", default=["bat-in", "bone", "lora", "pissa"], choices=[*METHODS, *RANKLESS])
    add("--rank", type=int, default=64)
    add("--rates", nargs="+", type=float, choices=GRID, metavar="LR", help="to begin with (default: around Bone's)")
    add("--seeds", nargs="+", type=int, default=[42, 43, 44], help="the first sweeps (default 42 43 44)")
    add("--steps", type=int, default=1000)
    add("--val_every", type=int, help="steps (default: a tenth of them)")
    add("--lr_final", type=float, default=0.1, help="share of the rate at the end of a run (default 0.1)")
    add("--output", default="out/methods", metavar="DIR")
    add("--model", default=DEMO["x060"], metavar="PTH")
    add("--rows", metavar="FILE")
    add("--template", metavar="NAME", help="as preprocess takes it")
    add("--utf16", action="store_true")
    add("--held_out", type=int, default=16, help="rows to validate on (default 16)")
    add("--retain_text", metavar="TXT")
    add("--retain_chars", type=int, default=8192, help="(default 8192)")
    args = parser.parse_args(own)
    folder = Path(args.output or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    if args.rows or args.quick:
        train = [*map(str, made_data(folder, args)), *SMALL, *train]
    if "--val_split" in train:
        train = ["--val_seed", "42", *train]  # runs of all seeds validate on the same samples
    sizes, channels = measure(args.methods, args.rank, folder, train)
    rates = args.rates or rates_around(automatic_rate(AdapterConfig(mode="bone"), channels).value)
    results = complete_runs(folder / "results.jsonl")
    while cells := next_cells(args.methods, rates, args.seeds, losses_of(results)):
        for cell in cells:
            results[cell] = train_cell(folder, cell, sizes[cell.method], args, train)
            print(*cell, f"validation loss {results[cell]['val_loss']:.4f}", flush=True)
    report(folder, args, sizes, results)


def made_data(folder, args):
    """Write the data of --rows -> train.py's flags for them."""
    texts = texts_of(args.rows or demo_rows(folder), args.template)
    parts = {"data_file": texts[: -args.held_out], "val_data": texts[-args.held_out :]}
    if args.retain_text:
        parts["retain_data"] = [Path(args.retain_text).read_text(encoding="utf-8")[: args.retain_chars]]
    flags = ["--load_model", args.model]
    for name, part in parts.items():
        vocabulary = 256 if args.utf16 else BytesTokenizer.vocab_size
        write_tokens(folder / name, vocabulary, [tokens_of(text, args.utf16) for text in part])
        flags += [f"--{name}", folder / name]
    return flags


def demo_rows(folder):
    """Write a few rows of the demo's task -> their file."""
    run(ROOT / "demo" / "task.py", "finetune", "--documents", 24, "--output", folder / "rows.jsonl")
    return folder / "rows.jsonl"


def texts_of(path, template):
    """The text of each row of a file, laid out by a template if one is named."""
    layout = Template(read_template(template)) if template else RowLayout()
    return ["".join(text for text, _ in layout.segments(parse(item))) for _, item in read_rows(path)]


def tokens_of(text, utf16):
    """The tokens of one document."""
    if utf16:
        return list((text + TURN_END).encode("utf-16-le"))
    return [*BytesTokenizer().encode(text), BytesTokenizer.end_id]


def method_flags(method, ranks=(0, 0)):
    """train.py's flags for a method of these (rank, mini_rank); those that are 0 are left out."""
    if method in RANKLESS:
        return RANKLESS[method]
    word = next(word for word in WORDS if method in forms(word))
    settings = {"bone_mode": method} if len(forms(word)) > 1 else {}
    settings |= {key: rank for key, rank in zip(WORDS[word].sizes, ranks) if rank}
    return ["--peft", word, "--peft_config", json.dumps(settings)]


def measure(methods, rank, folder, train):
    """({method: Size}, the base's channels), all of about as many parameters as the first method at this rank."""
    sizes, layers, wanted = {}, {}, 0
    for method in methods:
        ranks = (rank, 0) if not sizes else (0, 0) if method in RANKLESS else matched_size(method, wanted, layers)
        request = parse_run([*train, "--proj_dir", str(folder), *method_flags(method, ranks)])
        if not sizes:
            layers = Counter(request.base.linear_shapes[name] for name in request.layers)
            wanted = parameter_count(method, rank, 0, layers)
        sizes[method] = Size(ranks, count(request.config.model, request.config.adapter).trains)
        print(f"{method}: {sizes[method].trained:,} trained parameters, rank {ranks[0]}", flush=True)
    return sizes, request.config.model.n_embd


def parameter_count(method, rank, mini_rank, layers):
    """The number of parameters that a method trains on layers, {(out, in): their number}."""
    settings = AdapterConfig(rank=rank, mini_rank=mini_rank)
    return sum(number * METHODS[method].trains(settings, *layer) for layer, number in layers.items())


def matched_size(method, wanted, layers):
    """The (rank, mini_rank) with the number of parameters nearest to `wanted`; of equally near ones the squarest."""
    outs = math.gcd(*(out for out, _ in layers))
    mini_ranks = [width for width in range(1, outs + 1) if outs % width == 0]
    fitting = [
        (rank, mini)
        for rank in range(1, max(map(max, layers)) + 1)
        for mini in (mini_ranks if "mini_rank" in METHODS[method].sizes else [0])
        if all(METHODS[method].fits(AdapterConfig(rank=rank, mini_rank=mini), *layer) for layer in layers)
    ]
    return min(fitting, key=lambda size: (abs(parameter_count(method, *size, layers) - wanted), abs(size[0] - size[1])))


def rates_around(rate):
    """The three rates of GRID around the one that is nearest to a rate."""
    place = GRID.index(min(GRID, key=lambda each: abs(math.log(rate / each))))
    return GRID[place - 1 : place + 2]


def best_rate(method, seed, losses):
    """The rate of a method's lowest loss with a seed, the lower of two equal ones."""
    return min((loss, cell.rate) for cell, loss in losses.items() if cell[::2] == (method, seed))[1]


def next_cells(methods, rates, seeds, losses):
    """The runs to do next, given the losses of those done, infinite for one that diverged; none at the end.

    Methods take turns. The other seeds follow all sweeps, so that a comparison that is cut short is cut for all.
    """
    sweeps, finals = [], []
    for method in methods:
        wanted = [Cell(method, rate, seeds[0]) for rate in rates]
        if all(cell in losses for cell in wanted):
            best = best_rate(method, seeds[0], losses)
            place = GRID.index(best)
            wanted = [Cell(method, rate, seeds[0]) for rate in GRID[max(place - 1, 0) : place + 2]]
            finals += [Cell(method, best, seed) for seed in seeds[1:]]
        sweeps += wanted
    due = [cell for cell in sorted(sweeps, key=lambda cell: cell.rate) if cell not in losses]
    return due or [cell for cell in sorted(finals, key=lambda cell: seeds.index(cell.seed)) if cell not in losses]


def complete_runs(path):
    """{Cell: its line} of results.jsonl."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {Cell(line["method"], line["rate"], line["seed"]): line for line in lines}


def losses_of(results):
    """{Cell: the last validation loss} of complete runs, infinite if one diverged."""
    return {cell: line["val_loss"] for cell, line in results.items()}


def train_cell(folder, cell, size, args, train):
    """Train a Cell -> its line of results.jsonl, which it appends; a run that fails but by divergence ends all."""
    place = folder / "runs" / "-".join(map(str, cell))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    settings = {
        "lr_init": cell.rate,
        "lr_final": cell.rate * args.lr_final,
        "random_seed": cell.seed,
        "epoch_steps": args.steps,
        "epoch_count": 1,
        "val_every": args.val_every or -(-args.steps // 10),
        "proj_dir": place,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "train.py", "--answer_rows", "0", *train, *method_flags(cell.method, size.ranks)]
    with open(place / "log.txt", "wb") as log:
        child = subprocess.Popen([*command, *words], stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)  # which gives the peak of this process alone
    child.returncode = os.waitstatus_to_exitcode(status)
    text = (place / "log.txt").read_text(errors="replace")
    diverged = child.returncode == 1 and DIVERGED in text
    if child.returncode and not diverged:
        sys.exit(text)
    records = read_metrics(place / "metrics.jsonl")
    steps = [record["tokens"] / max(record["tokens_per_s"], 0.1) for record in records if "tokens" in record]
    line = cell._asdict() | {
        "rank": size.ranks[0],
        "parameters": size.trained,
        "val_loss": math.inf if diverged else series(records, "val_loss")[1][-1],
        "validations": list(zip(*series(records, "val_loss"))),
        "retained": [loss for name in ("retain_start", "retain_loss") for loss in series(records, name)[1]],
        "step_ms": 1e3 * statistics.median(steps),
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def report(folder, args, sizes, results):
    """Print and write the table, the lowest mean loss first, and draw the last loss over the rate."""
    losses = losses_of(results)
    lines, rates = [], {method: best_rate(method, args.seeds[0], losses) for method in args.methods}
    for method, rate in rates.items():
        runs = [results[Cell(method, rate, seed)] for seed in args.seeds]
        values = [run["val_loss"] for run in runs]
        cells = {"method": method, "rank": ", ".join(str(rank) for rank in sizes[method].ranks if rank)}
        cells |= {"trained parameters": f"{sizes[method].trained:,}", "best rate": f"{rate:g}"}
        cells["validation loss"] = f"{statistics.fmean(values):.4f}"
        cells["± (standard deviation)"] = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        if ends := [(run["retained"][-1], run["retained"][-1] - run["retained"][0]) for run in runs if run["retained"]]:
            cells["retained loss"], cells["its rise"] = (f"{statistics.fmean(each):.4f}" for each in zip(*ends))
        cells["ms a step"] = f"{statistics.median(run['step_ms'] for run in runs):.0f}"
        cells["process, MB"] = f"{max(run['peak_mb'] for run in runs):.0f}"
        lines.append((statistics.fmean(values), cells))
    table = [cells for _, cells in sorted(lines, key=lambda line: line[0])]
    rows = [list(table[0]), ["---"] * len(table[0]), *(list(cells.values()) for cells in table)]
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    print(text, end="")
    (folder / "table.md").write_text(text)
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for number, method in enumerate(args.methods):
        swept = {cell.rate: loss for cell, loss in losses.items() if cell[::2] == (method, args.seeds[0])}
        points = sorted((rate, loss) for rate, loss in swept.items() if math.isfinite(loss))
        axes.plot(*zip(*points), marker="o", label=method, **look(number))
    axes.set(xlabel="learning rate", ylabel="final validation loss (nats per token)", xscale="log")
    plain_axes(axes)
    axes.legend(frameon=False)
    save_figure(figure, folder / "rates.png")


if __name__ == "__main__":
    exit_on_user_error(main)
