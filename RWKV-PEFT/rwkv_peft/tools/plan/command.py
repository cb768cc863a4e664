"""`rwkv-peft plan`: print the memory and disk that a run of train.py will take, whether it fits, and what would help.

rwkv-peft plan --load_model rwkv6-7b.pth --ctx_len 1024 --gpu 24GiB
"""

from collections.abc import Iterable, Iterator

import torch

from ...adapters.inject import InjectReport
from ...checkpoints.atomic import room_at
from ...checkpoints.base import Base
from ...checkpoints.tensors import DTYPES
from ...cli.errors import UserError
from ...cli.names import NONE
from ...cli.parser import counted
from ...config.objective import TEACHER
from ...data.recorded import find_tokenizer
from ...gpus import better_precision, count_gpus
from ...memory import main_memory
from ...models import family_named
from ...training.flags.request import Request, request_of
from ...training.header import describe_adapter, shared_rows
from .disk import written
from .fits import LARGEST, TOKENS, changes, largest_rows, largest_tokens, usable
from .flags import parse_flags
from .parts import ALWAYS, CPU, GPU, Estimate, Part, peak

NAMES = ((GPU, "GPU"), (CPU, "main memory"))
COLUMN = 38  # width of a line's first column: the longest flag and its value
MOMENTS = "while drawing", "at the loss", "in the backward pass", "in the update"


def main(argv: list[str]) -> int:
    """argv -> 0 if the run fits, 1 if it does not. Raises UserError as train.py does, and for --accelerator gpu
    without a GPU to plan for."""
    flags = parse_flags(argv)
    request = request_of(flags)
    if request.base is not None and request.config.data.of_rows:
        find_tokenizer(request.config.data.tokenizer, request.config.model.vocab_size)
    memory = memory_of(flags.args.gpu, flags.args.accelerator)
    accelerator = GPU if GPU in memory else CPU
    estimate = estimate_of(request, accelerator)
    here = flags.args.gpu is None  # the plan is for this machine
    note = here and better_precision(request.config.train.precision, accelerator)
    for line in (
        *head(request, estimate),
        *([f"          {note}"] if note else []),
        "",
        *table(estimate, memory),
        "",
        *advice(estimate, memory),
        "",
        *disk(estimate, request.base),
    ):
        print(line)
    return 0 if fits(estimate, memory) else 1


def memory_of(size: int | None, accelerator: str) -> dict[str, int]:
    """{device: bytes of its memory, 0 if unknown}, for a machine whose GPU has `size` bytes, or for this one if size is
    None. Raises UserError if accelerator is "gpu" and this machine has none."""
    if size is not None:
        return {GPU: size, CPU: 0}
    main, _ = main_memory()
    gpus = 0 if accelerator == "cpu" else count_gpus("name the memory of a GPU with --gpu 24GiB")
    if accelerator == "gpu" and not gpus:
        raise UserError(
            "--accelerator gpu: this machine has no GPU to plan for; name the memory of one with --gpu 24GiB"
        )
    if gpus:
        return {GPU: torch.cuda.get_device_properties(0).total_memory, CPU: main}
    return {CPU: main}


def estimate_of(request: Request, accelerator: str) -> Estimate:
    """Make the Estimate of a Request. Without a base, an adapter's base is assumed to have the dtype of the training; a
    new model is made in memory."""
    config, base = request.config, request.base
    teacher = None if request.teacher is None else request.teacher.config
    if teacher is None and TEACHER in config.objective.needs:
        teacher = config.model  # which teaches itself
    if base is None:
        return Estimate.of(config, accelerator, mapped=config.adapter.method != NONE, teacher=teacher)
    dtype = DTYPES[config.train.precision]
    size = sum(tensor.nbytes for tensor in base.tensors.values())
    mapped = all(tensor.dtype == dtype for tensor in base.tensors.values())
    return Estimate.of(config, accelerator, size, mapped, teacher)


def processes(estimate: Estimate, device: str) -> int:
    """The number of a node's processes that share a device."""
    return estimate.config.train.devices if device == CPU else 1


def fits(estimate: Estimate, memory: dict[str, int]) -> bool:
    """Return whether the run fits each device whose memory is known."""
    data = estimate.config.data
    parts = estimate.parts(data.micro_bsz, data.ctx_len)
    return all(
        peak(parts, device) * processes(estimate, device) <= usable(device, size)
        for device, size in memory.items()
        if size
    )


def head(request: Request, estimate: Estimate) -> Iterator[str]:
    """Yield lines on the model, on what trains, and on the batch."""
    model, train, data = estimate.config.model, estimate.config.train, estimate.config.data
    family, counts = family_named(model.version), estimate.counts
    yield (
        f"model     {family.name}, {counted(model.n_layer, 'layer')}, {model.n_embd} channels, vocabulary "
        f"{model.vocab_size}" + (f", from {train.load_model}" if train.load_model else "")
    )
    report = InjectReport(request.layers, counts.trains, counts.total)
    yield f"training  {describe_adapter(estimate.config.adapter)}: {report}"
    if words := estimate.config.objective.describe():
        yield f"objective {words}"
    yield (
        f"batch     {data.micro_bsz} x {data.ctx_len} tokens a device, {train.num_nodes} x {train.devices} "
        f"{estimate.accelerator}, {train.strategy}, {train.precision}, --grad_cp {int(train.grad_cp)}"
    )
    if train.context_parallel > 1:
        yield f"          {shared_rows(estimate.config)}"


def table(estimate: Estimate, memory: dict[str, int]) -> Iterator[str]:
    """Yield lines on the parts of each device, and on its peak."""
    data = estimate.config.data
    parts = estimate.parts(data.micro_bsz, data.ctx_len)
    for device, name in NAMES:
        if device not in memory:
            continue
        size = memory[device]
        yield f"{name}{f' of {gib(size)}' if size else ''}, each process" + moments(parts, device)
        for part in parts:
            if part.device == device:
                yield f"  {part.name:{COLUMN - 2}}{gib(part.size):>12}{when(part)}"
        total = peak(parts, device)
        yield f"  {'peak':{COLUMN - 2}}{gib(total):>12}{verdict(estimate, device, total, size)}"
    if pages := estimate.file_pages():
        yield f"also, pages of the base's file, {gib(pages)}, which the system takes back when memory is short"


def moments(parts: Iterable[Part], device: str) -> str:
    """Name the moment of a step that is the peak; "" if all moments are equal."""
    here = [part for part in parts if part.device == device]
    totals = [sum(part.size for part in here if moment in part.when) for moment in ALWAYS]
    same = len(set(totals)) == 1
    return "" if same else f"; most of it {MOMENTS[totals.index(max(totals))]}"


def when(part: Part) -> str:
    """Name the moments of a part; "" if it is always there."""
    if part.when == ALWAYS:
        return ""
    return "  " + " and ".join(MOMENTS[ALWAYS.index(moment)] for moment in part.when)


def verdict(estimate: Estimate, device: str, total: int, size: int) -> str:
    """Say whether a peak fits a device of `size` bytes; "" for 0, an unknown size."""
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
    yield f"{'instead':{COLUMN}}{'peak':>12}{'less':>12}   --micro_bsz up to"
    now = peak(estimate.parts(data.micro_bsz, data.ctx_len), here)
    for change in changes(estimate, room):
        yield f"{change.flags:{COLUMN}}{gib(change.peak):>12}{gib(now - change.peak):>12}   {shown(change.rows)}"


def shown(number: int, step: int = 1) -> str:
    """Format a largest number: "none" for 0, "any" if nothing that was tried is too large."""
    if not number:
        return "none"
    return f"{number:,}" if number < (LARGEST // 2) * step else "any"


def disk(estimate: Estimate, base: Base | None) -> Iterator[str]:
    """Yield lines on the files that the run writes, and on the room for them."""
    files, folder = written(estimate, base), estimate.config.train.proj_dir
    total, free = sum(file.copies * file.size for file in files), room_at(folder)
    yield f"disk      {gib(total)} in {folder}, which has {gib(free)} free" + (
        "" if total <= free else ": it does not fit"
    )
    for file in files:
        yield f"  {file.name:{COLUMN - 2}}{gib(file.size):>12} x {file.copies}"


def gib(size: float) -> str:
    """Format bytes in GiB or MiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"
