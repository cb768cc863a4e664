"""The loss scale of --precision fp16. DeepSpeed halves it, and skips the step, if gradients overflow, and doubles it
later."""

from collections.abc import Mapping
from typing import Any

KEPT = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # its counters, which a resumed run takes up


def dynamic_scaler(optimizer: Any) -> Any:
    """The loss scaler of a ZeRO optimizer, None unless it changes the scale."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def skipped(optimizer: Any) -> bool:
    """Tell whether a ZeRO optimizer has just skipped a step, because gradients overflowed, and can lower the scale."""
    scaler = dynamic_scaler(optimizer)
    return scaler is not None and optimizer.overflow and scaler.cur_scale > scaler.min_scale


def counters_of(optimizer: Any) -> dict[str, float]:
    """The loss scaler's counters, {} if there are none."""
    scaler = dynamic_scaler(optimizer)
    return {} if scaler is None else {name: getattr(scaler, name) for name in KEPT}


def go_on_with(optimizer: Any, counters: Mapping[str, float]) -> None:
    """Set the loss scaler's counters to those of a checkpoint."""
    for name in counters_of(optimizer).keys() & counters.keys():
        setattr(optimizer.loss_scaler, name, counters[name])
