"""Validation while training: loss and perplexity over held-out samples, the best adapter kept, early stopping."""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..config import TrainConfig
from ..data.batches import EvalBatches
from ..data.samples import Samples
from .history import Lowest
from .plan import Plan
from .saver import Saver
from .watch import Watch

if TYPE_CHECKING:
    from .lit import Lit


class Validator:
    """Called on all ranks after each step; every val_every steps (0: every epoch) and after the last one it goes
    through `samples` once.

    A new lowest loss saves the trained tensors under the name "best". After early_stop validations in a row without
    one (0: never) `exhausted` becomes true. `watch` (training/watch.py) hears of every batch; `lowest` is that of the
    run so far.
    """

    def __init__(
        self,
        samples: Samples,
        micro_bsz: int,
        train: TrainConfig,
        plan: Plan,
        saver: Saver,
        watch: Watch,
        lowest: Lowest,
    ) -> None:
        self.samples, self.micro_bsz, self.saver, self.watch = samples, micro_bsz, saver, watch
        self.every, self.patience = train.val_every or plan.epoch_steps, train.early_stop
        self.plan, self.lowest = plan, lowest

    @property
    def best(self) -> float:
        """The lowest loss so far."""
        return self.lowest.loss

    @property
    def exhausted(self) -> bool:
        return self.lowest.exhausts(self.patience)

    def __call__(self, trainer: Any, lit: "Lit", done: int) -> dict[str, float]:
        """{"val_loss"} and its perplexity "val_ppl", or what the step measures besides a loss, where this step
        validates, else {}."""
        if done % self.every and done != self.plan.total_steps:
            return {}
        loss, measures = self.measure(trainer, lit)
        if self.lowest.note(loss):
            self.saver.save_tensors(trainer, lit, ["best"])
        measures = measures or {"ppl": math.exp(min(loss, 700.0))}
        return {"val_loss": loss, **{f"val_{name}": value for name, value in measures.items()}}

    @torch.no_grad()
    def measure(self, trainer: Any, lit: "Lit") -> tuple[float, dict[str, float]]:
        """The mean loss of all validation samples, over all ranks, and of what the step measures besides."""
        device = trainer.strategy.root_device
        sums: list[torch.Tensor] = []
        lit.model.eval()
        for batch in EvalBatches(self.samples, self.micro_bsz, trainer.global_rank, trainer.world_size):
            self.watch.moved(f"the validation after step {lit.step}")
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            loss = lit.compute.total(lit.model, batch)
            numbers = (lit.compute.items(batch), loss, *lit.compute.measures.values())
            sums.append(torch.stack([number.double() for number in numbers]))
        lit.model.train()
        total = torch.stack(sums).sum(0)
        if trainer.world_size > 1:
            dist.all_reduce(total)
        items, loss, *measures = total.tolist()
        items = max(1.0, items)
        return loss / items, {name: value / items for name, value in zip(lit.compute.measures, measures)}
