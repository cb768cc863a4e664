"""`rwkv-peft plan`: print the memory and disk of a run of train.py, if it fits, and the flags that lower them.

rwkv-peft plan --load_model rwkv6-7b.pth --ctx_len 1024 --gpu 24GiB

All is counted by formula from settings and the header of the base, in a fraction of a second: torch is imported only to
refuse a mistake in train.py's words, and for a teacher that is put together of several files.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

from ...checkpoints.atomic import room_at
from ...checkpoints.pth_header import TensorHeader, read_header
from ...cli.errors import UserError, short
from ...cli.names import NONE, STATE, generation
from ...cli.parser import counted
from ...cli.rules import EXCLUDES, Rule
from ...cli.tables import GENERATIONS
from ...config import STRATEGIES, AdapterConfig, ModelConfig, RunConfig, forms, problems
from ...data.recorded import find_tokenizer
from ...memory import main_memory
from ...training.estimate.activations import BLOCKS, CPU, GPU
from ...training.estimate.memory import ALWAYS, Estimate, Part, keys_of, method_named, peak, written
from ...training.flags.checks import check_base
from ...training.flags.parser import build_parser
from ...training.flags.request import Flags, goes_together, new_model, open_request, parse, targets_of, validate

PROG = "rwkv-peft plan"
RULES = (
    Rule("--gpu", EXCLUDES, "--accelerator cpu", "it plans for a GPU, and that trains on none"),
    Rule(PROG, EXCLUDES, "--write_config", "a plan writes nothing", "give it to train.py"),
)
LEAST, MOST = 1 << 20, 1 << 40  # bytes of a GPU
UNITS = MappingProxyType({"": 30, "g": 30, "m": 20})
DTYPES = MappingProxyType({"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"})
SPARE = 0.95  # share of a GPU's memory to plan with, because the allocator leaves gaps between its blocks
TOKENS = 64  # the step in which contexts are tried
LARGEST = 1 << 24  # numbers of rows, and multiples of TOKENS, are tried below it
NAMES = ((GPU, "GPU"), (CPU, "main memory"))
Planned = tuple[
    RunConfig, Counter[str], ModelConfig | None
]  # settings, bytes of the base by dtype, the teacher's model
COLUMN = 38  # width of a line's first column: the longest flag and its value
MOMENTS = "while drawing", "at the loss", "in the backward pass", "in the update"


def parse_flags(argv: list[str]) -> Flags:
    """argv -> Flags of train.py, with --data_file optional, and --gpu. Raises UserError for flags that are
    mistaken or contradict each other."""
    parser = build_parser()
    parser.prog, parser.usage = PROG, f"{PROG} [--load_model MODEL] [--gpu SIZE] [flags of train.py]"
    parser.description = (
        "Print how much memory and disk a run takes, before it begins. Only the header of --load_model is read; "
        "without it the model is that of --n_layer, --n_embd and --vocab_size. Exit code 1 if the run does not fit."
    )
    for action in parser._actions:
        if action.dest == "data_file":
            action.required, action.default = False, ""
    parser.add_argument(
        "--gpu",
        type=memory_size,
        metavar="SIZE",
        help="plan for a GPU of this memory, such as 24GiB (or 24GB, as its box says), instead of this machine",
    )
    parser.rules = RULES
    parser.check_rules(RULES)
    return validate(parse(argv, parser, here=False), here=False)


class Memory(int):
    """Bytes, printed in GiB."""

    def __str__(self) -> str:
        return f"{self / 2**30:g}GiB"


def memory_size(text: str) -> Memory:
    """ "24GiB" -> bytes. Of the unit only the first letter counts: g or m in either case, GiB without one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([gm]?)(?:i?b)?", text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{short(text)!r} is no size of a memory; write it as 24GiB")
    size = float(found[1]) * 2 ** UNITS[found[2]]
    if not LEAST <= size <= MOST:
        raise argparse.ArgumentTypeError(f"{short(text)} is no memory of a GPU: 1 MiB to 1,024 GiB")
    return Memory(size)


def main(argv: list[str]) -> int:
    """argv -> 0 if the run fits, 1 if it does not. Raises UserError as train.py does, and for --accelerator gpu
    without a GPU to plan for."""
    flags = parse_flags(argv)
    memory = memory_of(flags)
    estimate = estimate_of(flags, GPU if GPU in memory else CPU)
    config = estimate.config
    if estimate.file and config.data.of_rows:
        find_tokenizer(config.data.tokenizer, config.model.vocab_size)
    lines = (head(estimate), [""], table(estimate, memory), [""], advice(estimate, memory), [""], disk(estimate))
    for line in (line for some in lines for line in some):
        print(line)
    return 0 if fits(estimate, memory) else 1


def memory_of(flags: Flags) -> dict[str, int]:
    """{device: bytes of its memory, 0 if unknown} for a machine with a GPU of --gpu, or for this one. Raises UserError
    if --accelerator is "gpu" and this machine has none."""
    if flags.args.gpu is not None:
        return {GPU: flags.args.gpu, CPU: 0}
    memory = {CPU: main_memory()[0]}
    if flags.train.accelerator != CPU and has_gpu():
        import torch

        from ...gpus import count_gpus

        if count_gpus("name the memory of a GPU with --gpu 24GiB"):
            memory[GPU] = torch.cuda.get_device_properties(0).total_memory
    if flags.train.accelerator == GPU and GPU not in memory:
        raise UserError(
            "--accelerator gpu: this machine has no GPU to plan for; name the memory of one with --gpu 24GiB"
        )
    return memory


def has_gpu() -> bool:
    """Return True if there are devices of GPUs, usable by torch or not."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or any(Path(name).exists() for name in ("/dev/dxg", "/dev/kfd"))


def estimate_of(flags: Flags, accelerator: str) -> Estimate:
    """The Estimate of a run, by headers alone if they show a run that train.py takes. Without a base, an adapter's base
    is assumed to have the dtype of the training; a new model is made in memory. Raises UserError for a run that
    train.py refuses, in its words."""
    config, sizes, teacher = of_headers(flags) or of_request(flags)
    teacher = Estimate.teacher_of(config, teacher)
    mapped = set(sizes) <= {config.train.precision} if sizes else config.adapter.method != NONE
    return Estimate(config, accelerator, sum(sizes.values()), mapped, teacher, frozenset(sizes))


def of_request(flags: Flags) -> Planned:
    """The Planned of a run, by opening its base and teacher. Raises UserError as train.py does."""
    request = open_request(flags)
    tensors = {} if request.base is None else request.base.tensors
    sizes = Counter[str]()
    for tensor in tensors.values():
        sizes[DTYPES[str(tensor.dtype)]] += tensor.nbytes
    return request.config, sizes, None if request.teacher is None else request.teacher.config


def of_headers(flags: Flags) -> Planned | None:
    """The Planned of a run, by the headers of base and teacher; None if they do not show that the settings fit."""
    args, adapter, data, train, objective = flags[:5]
    header = (read_header(args.load_model) if args.load_model else None) or {}
    model = dimensions_of(header) if args.load_model else new_dimensions(args)
    base: Any = SimpleNamespace(config=model)
    if model is None or any(check_base(args, base)):
        return None
    if "length" in model.layer_state._fields and (train.chunk_ctx or train.context_parallel > 1):
        return None
    keys = keys_of(model.version)
    family: Any = SimpleNamespace(targets=keys.TARGETS)
    adapter = replace(adapter, targets=targets_of(adapter.targets, family))
    if not adapts(adapter, model) or not set(adapter.train_parts) <= {*keys.PARTS, STATE}:
        return None
    teacher = dimensions_of(read_header(objective.teacher) or {}) if objective.teacher else None
    if objective.teacher and (teacher is None or teacher.vocab_size != model.vocab_size):
        return None
    sizes = Counter[str]()
    for tensor in header.values():
        sizes[tensor.dtype] += tensor.nbytes
    return RunConfig(model, adapter, data, train, objective, flags.given), sizes, teacher


def new_dimensions(args: argparse.Namespace) -> ModelConfig | None:
    """The dimensions of a new model; None if flags lack some, or give impossible ones."""
    version = args.model_version or args.my_testing or next(iter(GENERATIONS))
    try:
        return new_model(args, keys_of(version))
    except UserError:
        return None


def dimensions_of(header: dict[str, TensorHeader]) -> ModelConfig | None:
    """The dimensions of a model with these tensors and no others, or None."""
    for version in reversed(list(GENERATIONS)):
        keys = keys_of(version)
        if getattr(keys, "SIGN", None) in header:
            try:
                model = keys.dimensions(header)
            except (UserError, KeyError, ValueError, IndexError, ZeroDivisionError):
                return None
            return model if keys.shapes(model) == {key: each.shape for key, each in header.items()} else None
    return None


def adapts(adapter: AdapterConfig, model: ModelConfig) -> bool:
    """Return whether an adapter, if there is one, fits a model's layers."""
    if adapter.method == NONE:
        return adapter.quant == "none"
    modes = forms(adapter.method)
    if len(modes) > 1 and adapter.mode not in modes or any(problems(adapter, adapter.method)):
        return False
    method = method_named(adapter)
    assert method is not None  # NONE was answered above
    shapes, names = keys_of(model.version).shapes(model), [f".{name}.weight" for name in adapter.targets]
    found = {name: [shape for key, shape in shapes.items() if key.endswith(name)] for name in names}
    return all(found.values()) and all(
        len(shape) == 2 and method.fits(adapter, *shape) for each in found.values() for shape in each
    )


def usable(device: str, total: int) -> int:
    """Bytes of a device to plan with: SPARE of a GPU, all of main memory."""
    return int(SPARE * total) if device == GPU else total


def processes(estimate: Estimate, device: str) -> int:
    """The number of a node's processes that share a device."""
    return estimate.config.train.devices if device == CPU else 1


def fits(estimate: Estimate, memory: dict[str, int]) -> bool:
    """Return True if the run fits each device of known memory."""
    parts = estimate.parts()
    return all(
        peak(parts, device) * processes(estimate, device) <= usable(device, size)
        for device, size in memory.items()
        if size
    )


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number below LARGEST that fits, 0 if none does. If a number fits, all below it must."""
    low, high = 0, 1
    while high < LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_rows(estimate: Estimate, room: int) -> int:
    """The largest micro_bsz with a peak within `room` bytes, at the run's ctx_len."""
    return largest(lambda rows: peak(estimate.parts(rows=rows), estimate.accelerator) <= room)


def largest_tokens(estimate: Estimate, room: int) -> int:
    """The largest ctx_len, a multiple of TOKENS, with a peak within `room` bytes, at the run's micro_bsz."""
    return TOKENS * largest(lambda n: peak(estimate.parts(tokens=TOKENS * n), estimate.accelerator) <= room)


class SmallerRun(NamedTuple):
    """Other flags, their peak in bytes, and the largest micro_bsz that fits with them at the run's ctx_len."""

    flags: str
    peak: int
    rows: int


def changes(estimate: Estimate, room: int) -> list[SmallerRun]:
    """The Changes that lower the peak, the lowest peak first."""
    here, found = estimate.accelerator, []
    now = peak(estimate.parts(), here)
    for flags, config in alternatives(estimate.config):
        together = goes_together(config.adapter, config.data, config.train, config.objective)
        if together and adapts(config.adapter, config.model):
            same = config.train.precision == estimate.config.train.precision
            other = replace(estimate, config=config, mapped=estimate.mapped and same)
            if (then := peak(other.parts(), here)) < now:
                found.append(SmallerRun(flags, then, largest_rows(other, room)))
    return sorted(found, key=lambda change: change.peak)


def alternatives(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Yield (flags, RunConfig) for settings to try instead, one change at a time."""
    adapter, train = config.adapter, config.train
    if not train.grad_cp:
        yield "--grad_cp 1", replace(config, train=replace(train, grad_cp=True))
    if train.context_parallel < train.ranks:
        yield f"--context_parallel {train.ranks}", replace(config, train=replace(train, context_parallel=train.ranks))
    if train.precision == "fp32":
        yield "--precision bf16", replace(config, train=replace(train, precision="bf16"))
    for strategy in STRATEGIES:
        if strategy != train.strategy:
            yield f"--strategy {strategy}", replace(config, train=replace(train, strategy=strategy))
    if adapter.method == NONE:
        if not adapter.train_parts:
            bone = replace(adapter, method="bone", targets=keys_of(config.model.version).TARGETS)
            yield "--peft bone", replace(config, adapter=bone)
        return
    for quant in ("nf4", "int8"):
        if adapter.quant == "none":
            yield f"--quant {quant}", replace(config, adapter=replace(adapter, quant=quant))
    if adapter.method == "bone" and adapter.mode.startswith("bat"):
        yield "--bone_mode bone", replace(config, adapter=replace(adapter, mode="bone"))


def head(estimate: Estimate) -> Iterator[str]:
    """Yield lines on the model, the trained parameters and the batch."""
    config, counts = estimate.config, estimate.counts
    model, train, data = config.model, config.train, config.data
    name = generation(model.version)
    yield (
        f"model     {name}, {counted(model.n_layer, 'layer')}, {model.n_embd} channels, vocabulary "
        f"{model.vocab_size}" + (f", from {train.load_model}" if train.load_model else "")
    )
    layers = f"{counted(counts.layers, 'layer')} adapted; " if counts.layers else ""
    yield (
        f"training  {adapter_words(config.adapter)}: {layers}trainable params: {counts.trains:,} || "
        f"all params: {counts.total:,} || trainable%: {100 * counts.trains / counts.total:.4f}"
    )
    if words := config.objective.describe():
        yield f"objective {words}"
    yield (
        f"batch     {data.micro_bsz} x {data.ctx_len} tokens a device, {train.num_nodes} x {train.devices} "
        f"{estimate.accelerator}, {train.strategy}, {train.precision}, --grad_cp {int(train.grad_cp)}"
    )
    if train.context_parallel > 1:
        yield f"          {train.context_parallel} ranks share each row (--context_parallel)"
    upper = {"--precision fp16": train.precision == "fp16", name: model.version not in BLOCKS}
    for words in (words for words, holds in upper.items() if holds):
        yield f"          activations are an upper bound with {words}"
    if train.compile:
        yield "          activations are those without --compile, which may hold fewer"


def adapter_words(adapter: AdapterConfig) -> str:
    """Name the method and its size, and the parts that train."""
    method, words = method_named(adapter), []
    if method is not None:
        sizes = (f"{name} {getattr(adapter, name)}" for name in method.sizes)
        words = [f"Bone {adapter.mode}" if adapter.method == "bone" else adapter.method, *sizes]
    elif not adapter.train_parts:
        words = ["full model"]
    else:
        words = ["time states" if adapter.states_alone else "parts of the model"]
    if adapter.quant != "none":
        words.append(f"--quant {adapter.quant}")
    if adapter.train_parts:
        words.append(f"--train_parts {' '.join(adapter.train_parts)}")
    return ", ".join(words)


def table(estimate: Estimate, memory: dict[str, int]) -> Iterator[str]:
    """Yield lines on the parts of each device, and on its peak."""
    parts = estimate.parts()
    for device, name in NAMES:
        if device not in memory:
            continue
        size = memory[device]
        yield f"{name}{f' of {gib(size)}' if size else ''}, each process"
        for part in parts:
            if part.device == device:
                yield f"  {part.name:{COLUMN - 2}}{gib(part.size):>12}{when(part)}"
        total = peak(parts, device)
        yield f"  {'peak':{COLUMN - 2}}{gib(total):>12}{verdict(estimate, device, total, size)}"
    if pages := estimate.file_pages():
        yield f"also, pages of the base's file, {gib(pages)}, which the system takes back when memory is short"


def when(part: Part) -> str:
    """Name the moments of a part; "" if it is always there."""
    if part.when == ALWAYS:
        return ""
    return "  " + " and ".join(MOMENTS[ALWAYS.index(moment)] for moment in part.when)


def verdict(estimate: Estimate, device: str, total: int, size: int) -> str:
    """The note if a peak fits a device of `size` bytes; "" for 0, an unknown size."""
    if not size:
        return ""
    several, room = processes(estimate, device), usable(device, size)
    needed = total * several
    times = f", {gib(needed)} for {several} processes" if several > 1 else ""
    return times + (", fits" if needed <= room else f", does not fit: {gib(room)} can be used")


def advice(estimate: Estimate, memory: dict[str, int]) -> Iterator[str]:
    """Yield lines on the largest batch and context, and on the changes by other flags."""
    here, data = estimate.accelerator, estimate.config.data
    room = usable(here, memory[here]) // processes(estimate, here)
    rows, tokens = largest_rows(estimate, room), largest_tokens(estimate, room)
    yield (
        f"fits      --micro_bsz up to {shown(rows)} at --ctx_len {data.ctx_len}; --ctx_len up to "
        f"{shown(tokens, TOKENS)} at --micro_bsz {data.micro_bsz}"
    )
    now, found = peak(estimate.parts(), here), changes(estimate, room)
    if found:
        yield f"{'instead':{COLUMN}}{'peak':>12}{'less':>12}   --micro_bsz up to"
    for change in found:
        yield f"{change.flags:{COLUMN}}{gib(change.peak):>12}{gib(now - change.peak):>12}   {shown(change.rows)}"


def shown(number: int, step: int = 1) -> str:
    """Format a largest number: "none" for 0, "any" if nothing that was tried is too large."""
    if not number:
        return "none"
    return f"{number:,}" if number < (LARGEST // 2) * step else "any"


def disk(estimate: Estimate) -> Iterator[str]:
    """Yield lines on the files that the run writes, and on the room for them."""
    files, folder = written(estimate), estimate.config.train.proj_dir
    total, free = sum(file.copies * file.size for file in files), room_at(folder)
    yield f"disk      {gib(total)} in {folder}, which has {gib(free)} free" + (
        "" if total <= free else ": it does not fit"
    )
    for file in files:
        yield f"  {file.name:{COLUMN - 2}}{gib(file.size):>12} x {file.copies}"


def gib(size: float) -> str:
    """Format bytes in GiB or MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"
