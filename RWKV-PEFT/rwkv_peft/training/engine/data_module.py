"""The run's micro batches as Lightning takes them."""

from collections.abc import Iterable, Iterator
from itertools import islice

import lightning.pytorch as pl

from ...data.batches import TrainBatch, TrainBatches
from ...data.samples import Samples
from ..step.plan import Plan


class RunBatches:
    """The `length` micro batches that a run still has to see; Lightning fetches none ahead if it knows the length."""

    def __init__(self, batches: Iterable[TrainBatch], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[TrainBatch]:
        return islice(self.batches, self.length)


class RunData(pl.LightningDataModule):
    """This rank's share of `samples`, from the plan's first step on."""

    def __init__(self, samples: Samples, plan: Plan, micro_bsz: int, accumulate: int) -> None:
        super().__init__()
        self.samples, self.plan, self.micro_bsz, self.accumulate = samples, plan, micro_bsz, accumulate

    def train_dataloader(self) -> RunBatches:
        plan = self.plan
        batches = TrainBatches(
            self.samples,
            self.micro_bsz,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            accumulate=self.accumulate,
            samples_seen=plan.first_sample,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
        return RunBatches(batches, (plan.total_steps - plan.first_step) * self.accumulate)
