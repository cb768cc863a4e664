"""The score of a task's records: the share of right answers with its standard error."""

import math
from collections.abc import Sequence

from ..cli import counted
from .records import Record


def share_of(measure: str, records: Sequence[Record]) -> float:
    """The share of records that are right by a measure."""
    return sum(bool(record[measure]) for record in records) / len(records)


def standard_error(share: float, total: int) -> float:
    """The standard error of a share of right ones among `total` independent answers, from their sample variance; NaN
    for a single answer."""
    return math.sqrt(share * (1 - share) / (total - 1)) if total > 1 else math.nan


def summary(task: str, measures: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Write the score of records in lines: shares, answers cut off, and the perplexity of single continuations."""
    total = len(records)
    lines = [f"{task}: {counted(total, 'problem')}"]
    for name in measures:
        share = share_of(name, records)
        error = standard_error(share, total)
        spread = f" ± {error:.1%} (standard error)" if math.isfinite(error) else ""
        lines.append(f"{name:<10} {share:7.1%}{spread}, {share * total:,.0f} of {total:,}")
    long = sum(record.get("end") == "length" for record in records)
    if long:
        lines.append(f"{counted(long, 'answer')} cut off at --max_tokens")
    alone = [record["logprobs"][0] for record in records if len(record.get("logprobs", ())) == 1]
    if alone:
        mean = sum(alone) / len(alone)
        lines.append(f"perplexity {math.exp(min(-mean, 700.0)):.4g} of the last word")
    return lines
