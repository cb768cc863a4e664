"""Choose the rows of a micro batch on a GPU for a run without --micro_bsz, by the card's memory and the data.

One short row at a time leaves a GPU waiting: a step launches the same kernels for one row as for eight, and of one row
they compute for a tenth of that time.
"""

import math
from dataclasses import replace
from typing import Any

from ..cli.parser import counted
from ..config import RunConfig
from .estimate.memory import GPU, Estimate, peak
from .flags.request import Request, goes_together

ROWS = 8  # at most: of some 300 tokens each they are enough work for the kernels of a step
SHARE = 0.75  # of a card's memory. The rest is for a desktop, for gaps, and for what the formulas leave out.


def with_batch_size(request: Request, config: RunConfig, rows: int, memory: int) -> tuple[RunConfig, list[str]]:
    """(the RunConfig with --micro_bsz chosen if flags leave it open, notes on that) for `rows` samples of data and GPUs
    of `memory` bytes (0: a CPU, for which nothing changes).

    The choice is the largest power of two up to ROWS that fits in SHARE of the memory, and with which the run still has
    as many steps as a few rows are read for: fewer, larger steps would learn less from a little data. Chosen rates grow
    with the root of it, as suits Adam (Malladi et al. 2022, arXiv 2205.10287). A smaller --micro_bsz that was given
    stays, with a note."""
    train, data, objective = config.train, config.data, config.objective
    if not memory or train.epoch_steps or data.of_prompts:  # the answers to a prompt are a batch by themselves
        return config, []
    teacher = None if request.teacher is None else request.teacher.config
    estimate = Estimate(config, GPU, teacher=Estimate.teacher_of(config, teacher))
    passes = 1 if train.epochs_chosen else train.epoch_count - train.epoch_begin
    is_given, best, limit = not train.rows_chosen, 1, f"{ROWS} are enough"
    while best < ROWS:
        more = replace(config, data=replace(data, micro_bsz=2 * best))
        steps = passes * -(-rows // more.step_samples)
        if not goes_together(more.adapter, more.data, more.train, objective):
            limit = "other flags admit no more"
        elif steps < objective.aim:
            limit = f"with more, {counted(rows, 'sample')} would make less than {objective.aim} steps"
        elif peak(estimate.parts(rows=2 * best), GPU) > SHARE * memory:
            card = f"{SHARE:.0%} of the card's {memory / 2**30:.0f} GiB"
            limit = f"more would take over {card} at --ctx_len {data.ctx_len}"
        else:
            best *= 2
            continue
        break
    if is_given:
        few = f"note: --micro_bsz {data.micro_bsz} leaves a GPU waiting between kernels; {best} would suit this run"
        return config, [few] * (data.micro_bsz < best)
    rates: dict[str, Any] = {}
    if not config.adapter.states_alone:  # whose rate was measured by itself
        rates = {name: float(f"{getattr(train, name) * math.sqrt(best):.2g}") for name in train.lr_chosen}
    config = replace(config, data=replace(data, micro_bsz=best), train=replace(train, **rates))
    return config, [f"--micro_bsz {best} is chosen, for this GPU: {limit}"]
