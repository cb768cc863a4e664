"""The largest batch and the longest context that fit a device, and how other flags would change the peak."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from ...adapters.block_affine import BlockAffine
from ...adapters.inject import check_adapter
from ...adapters.methods import METHODS, method_of, words_of
from ...checkpoints.base import linear_shapes
from ...cli.errors import UserError
from ...cli.names import NONE
from ...config import STRATEGIES, RunConfig
from ...models import family_named
from ...training.flags.request import goes_together
from .parts import GPU, Estimate, peak

SPARE = 0.95  # share of a GPU's memory to plan with, because the allocator leaves gaps between its blocks
TOKENS = 64  # the step in which contexts are tried
LARGEST = 1 << 24  # numbers of rows, and multiples of TOKENS, are tried below it


class Change(NamedTuple):
    """Other flags, their peak in bytes, and the largest micro_bsz that fits with them at the run's ctx_len."""

    flags: str
    peak: int
    rows: int


def usable(device: str, total: int) -> int:
    """Bytes of a device to plan with: SPARE of a GPU, all of main memory."""
    return int(SPARE * total) if device == GPU else total


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
    """The largest micro_bsz whose peak is within `room` bytes, at the run's ctx_len."""
    tokens, here = estimate.config.data.ctx_len, estimate.accelerator
    return largest(lambda rows: peak(estimate.parts(rows, tokens), here) <= room)


def largest_tokens(estimate: Estimate, room: int) -> int:
    """The largest ctx_len, a multiple of TOKENS, whose peak is within `room` bytes, at the run's micro_bsz."""
    rows, here = estimate.config.data.micro_bsz, estimate.accelerator
    return TOKENS * largest(lambda times: peak(estimate.parts(rows, TOKENS * times), here) <= room)


def changes(estimate: Estimate, room: int) -> list[Change]:
    """The Changes that lower the peak, the lowest peak first."""
    data, here = estimate.config.data, estimate.accelerator
    now = peak(estimate.parts(data.micro_bsz, data.ctx_len), here)
    found = []
    for flags, config in alternatives(estimate.config):
        if not trains(config):
            continue
        same = config.train.precision == estimate.config.train.precision
        other = Estimate.of(config, here, estimate.file, estimate.mapped and same, estimate.teacher)
        then = peak(other.parts(data.micro_bsz, data.ctx_len), here)
        if then < now:
            found.append(Change(flags, then, largest_rows(other, room)))
    return sorted(found, key=lambda change: change.peak)


def trains(config: RunConfig) -> bool:
    """Return whether train.py takes these settings together."""
    family = family_named(config.model.version)
    if not goes_together(config.adapter, config.data, config.train, config.objective):
        return False
    try:
        check_adapter(config.adapter, linear_shapes(family.shapes(config.model)), family.parts)
    except UserError:
        return False
    return True


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
    method = method_of(adapter)
    if method is None:
        targets = family_named(config.model.version).targets
        if adapter.method == NONE and not adapter.train_parts:
            yield (
                "--peft bone",
                replace(config, adapter=replace(adapter, **words_of(METHODS["bat-in"]), targets=targets)),
            )
        return
    for quant in ("nf4", "int8"):
        if adapter.quant == "none":
            yield f"--quant {quant}", replace(config, adapter=replace(adapter, quant=quant))
    if isinstance(method.change, BlockAffine):
        yield "--bone_mode bone", replace(config, adapter=replace(adapter, mode="bone"))
