"""Works out 7B and 14B on 1, 8 and 64 H100s from counts: the tables of docs/scale.md.

    python benchmarks/scale.py

Memory and files are those of `rwkv-peft plan`. Times are counts divided by published rates, so that no run is faster: a
GPU computes below its rate, and waits. A token costs two operations an element of each matrix, for each product: the
forward pass, the same again in the backward pass (--grad_cp 1), the gradient of what goes in, and that of the matrix if
it trains. Of links, the bytes that a GPU sends are counted, in rings.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property

from common import Parser

from rwkv_peft.models import family_named
from rwkv_peft.tools.plan.command import estimate_of, largest_rows, parse_flags, usable
from rwkv_peft.training.estimate.memory import CPU, GPU, Estimate, peak, written
from rwkv_peft.training.step.context_parallel import in_flight, waiting

GIB = 1 << 30
# H100 SXM and DGX H100 (NVIDIA's data sheets): memory, bfloat16 without sparsity, a direction of NVLink, of the port
# of 400 Gbit/s that each GPU has to other nodes, and of PCIe
MEMORY, FLOPS, NVLINK, NETWORK, PCIE = 80 * GIB, 989e12, 450e9, 50e9, 64e9
NODE = 8  # GPUs
DISK = 1e9  # bytes a second into a shared disk: assumed
# hours of a GPU for each unexpected interruption: 419 in 54 days of 16,384 H100s (Llama Team 2024, arXiv 2407.21783)
BETWEEN = 54 * 24 * 16384 / 419
SIZES = {"7.2B": (32, 4096), "13.3B": (61, 4096)}  # RWKV-7: layers, channels
TRAINS = {"bat-in": "--bone_mode bat-in --bone_r 64", "all": "--peft none"}
COUNTS = (1, 8, 64)
STRATEGIES = ("1", "2", "3")  # the one with the most tokens a second is taken, or the first of these
OFFLOAD = "2_offload"  # if none fits
ROWS, TOKENS = 16, 4096  # the most rows of a micro batch, and their length
LONG, SEGMENT = 1 << 20, 1 << 17  # tokens of a long row, and of its segments
UPDATES = 9  # operations of RWKV-7's recurrence on an element of its state


@cache
def config_of(size, trains):
    """The RunConfig of a size."""
    layers, channels = SIZES[size]
    words = f"--model_version x070 --n_layer {layers} --n_embd {channels} --vocab_size 65536 --grad_cp 1"
    return estimate_of(parse_flags([*words.split(), *TRAINS[trains].split()]), GPU).config


@dataclass(frozen=True)
class Run:
    """A run of a size on so many GPUs, of rows of so many tokens, which share_rows says whether all GPUs share, in
    segments of so many (0: whole)."""

    size: str
    trains: str
    gpus: int
    strategy: str = "1"
    tokens: int = TOKENS
    share_rows: bool = False
    segment: int = 0

    @cached_property
    def estimate(self):
        config, nodes = config_of(self.size, self.trains), -(-self.gpus // NODE)
        machine = {"devices": self.gpus // nodes, "num_nodes": nodes, "strategy": f"deepspeed_stage_{self.strategy}"}
        shared = {"context_parallel": self.gpus if self.share_rows else 1, "chunk_ctx": self.segment}
        train, data = replace(config.train, **machine, **shared), replace(config.data, ctx_len=self.tokens)
        return Estimate(replace(config, train=train, data=data), GPU, mapped=self.trains != "all")

    def peak(self, rows, device=GPU):
        return peak(self.estimate.parts(rows, self.tokens), device)

    @property
    def rows(self):
        """The largest power of two of rows that fits, ROWS at most; 0 if none does."""
        fits = min(ROWS, largest_rows(self.estimate, usable(GPU, MEMORY)))
        return fits and 1 << fits.bit_length() - 1

    @property
    def token_flops(self):
        """Operations for a token, without those on elements of activations."""
        model, counts, whole = self.estimate.config.model, self.estimate.counts, self.trains == "all"
        shapes = family_named(model.version).shapes(model)
        matrices = sum(math.prod(shape) for key, shape in shapes.items() if len(shape) == 2 and key != "emb.weight")
        recurrence = UPDATES * model.n_layer * model.dim_att * model.head_size
        return 2 * (3 + whole) * matrices + 2 * 4 * counts.of_adapter + 4 * recurrence

    @property
    def computing(self):
        """Seconds for a micro batch."""
        return self.rows * self.tokens * self.token_flops / FLOPS

    @property
    def speed(self):
        """Tokens a second of all GPUs, if they send nothing while they compute; 0 if no row fits."""
        sent, rate = self.exchanged
        return self.rows and self.gpus * self.rows * self.tokens / (self.computing + sent / rate)

    @property
    def exchanged(self):
        """(bytes that a GPU sends in a step of one micro batch, over which link): gradients to those that update them,
        what was updated to all, and in stage 3 every weight to all, twice; offloaded, gradients and weights to and from
        main memory."""
        counts, share = self.estimate.counts, (self.gpus - 1) / self.gpus
        item = 2
        if self.gpus == 1:
            return (2 * item * counts.trains, PCIE) if "offload" in self.strategy else (0, NVLINK)
        gathered = 2 * counts.total + counts.trains if self.strategy == "3" else 2 * counts.trains
        return share * item * gathered, NVLINK if self.gpus <= NODE else NETWORK


def chosen(size, trains, gpus):
    """The Run by the best strategy."""
    runs = [Run(size, trains, gpus, strategy) for strategy in STRATEGIES]
    best = max(runs, key=lambda run: round(run.speed, -2))
    return best if best.rows else Run(size, trains, gpus, OFFLOAD)


def table(head, lines):
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines))


def models():
    """What a token costs."""
    lines = []
    for size in SIZES:
        for trains in TRAINS:
            run = Run(size, trains, 1)
            counts = run.estimate.counts
            lines.append(
                (size, trains, f"{(counts.total - counts.of_adapter) / 1e9:.2f} G", f"{counts.trains / 1e6:,.0f} M")
                + (f"{run.token_flops / 1e9:.1f} G", f"{FLOPS / run.token_flops:,.0f}")
            )
    return table(
        ("model", "trains", "parameters", "that train", "operations a token", "tokens/s of a GPU at most"), lines
    )


def steps():
    """A step of one micro batch of rows of TOKENS tokens a GPU."""
    head = ("model", "trains", "GPUs", "stage", "rows a GPU", "peak", "main memory a process", "computing")
    lines = []
    for size in SIZES:
        for trains in TRAINS:
            for gpus in COUNTS:
                run = chosen(size, trains, gpus)
                sent, rate = run.exchanged
                lines.append(
                    (size, trains, gpus, run.strategy.replace("_", ", "), run.rows)
                    + (f"{run.peak(run.rows) / GIB:.1f} GiB", f"{run.peak(run.rows, CPU) / GIB:.1f} GiB")
                    + (f"{run.computing:.2f} s", f"{sent / 1e9:.1f} GB", f"{sent / rate:.2f} s")
                    + (f"{run.speed:,.0f}",)
                )
    return table((*head, "sent by a GPU", "sending", "tokens/s at most"), lines)


def long_rows():
    """One row of LONG tokens, shared by all GPUs."""
    lines = []
    for size in SIZES:
        for gpus in COUNTS[1:]:
            for segment in (0, SEGMENT):
                run = Run(size, "bat-in", gpus, "1", LONG, True, segment)
                model = run.estimate.config.model
                segments = LONG // segment if segment else in_flight(gpus, model.n_layer, LONG)
                sent = 2 * run.estimate.step.states(1) * segments
                most, size_of = run.peak(1), usable(GPU, MEMORY)
                lines.append(
                    (size, gpus, f"{segment:,}" if segment else "", segments, f"{most / GIB:.1f} GiB")
                    + ("yes" if most <= size_of else "no", f"{waiting(gpus, model.n_layer, segments):.1%}")
                    + (f"{sent / 1e9:.2f} GB",)
                )
    return table(("model", "GPUs", "segments of", "pieces", "peak", "fits", "waiting", "states sent by a GPU"), lines)


def checkpoints():
    """What a checkpoint holds, and how often one pays."""
    lines = []
    for size in SIZES:
        for trains in TRAINS:
            run = Run(size, trains, COUNTS[-1])
            result, saved = (file.size for file in written(run.estimate))
            seconds = (result + saved) / DISK
            each = [math.sqrt(2 * seconds / 3600 * BETWEEN / gpus) for gpus in COUNTS[1:]]
            lines.append(
                (size, trains, f"{result / GIB:.1f} GiB", f"{saved / GIB:.1f} GiB", f"{seconds:.0f} s")
                + tuple(f"{hours:.1f} h" for hours in each)
            )
    head = ("model", "trains", "result", "checkpoint", "both at 1 GB/s")
    return table((*head, *(f"best interval, {gpus} GPUs" for gpus in COUNTS[1:])), lines)


TABLES = (models, steps, long_rows, checkpoints)


if __name__ == "__main__":
    args = Parser(__doc__).parse_args()
    for made in TABLES[:1] if args.quick else TABLES:
        print(f"{made.__doc__}\n\n{made()}\n")
