"""Ctrl-C in a fine-tuning: save a checkpoint after the current step, then stop."""

import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class StopAtCtrlC(TrainerCallback):
    """Let Ctrl-C ask for a checkpoint and a stop after the current step; a second Ctrl-C stops at once. Only training
    in one process: several would have to agree on the step, so they still stop at once."""

    def __init__(self) -> None:
        self.begun = self.asked = False  # whether training has begun, and whether Ctrl-C has asked for its end

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = True
        if args.world_size == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.ask)

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; again to stop at once, without saving", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if signal.getsignal(signal.SIGINT) == self.ask:
            signal.signal(signal.SIGINT, signal.default_int_handler)
