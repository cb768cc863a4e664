"""The run's micro batches as Lightning takes them."""

from collections.abc import Iterable, Iterator
from itertools import islice

import lightning.pytorch as pl

from ...config import TrainConfig
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
    """This rank's samples, or those of its group, from the plan's first step on."""

    def __init__(self, samples: Samples, plan: Plan, micro_bsz: int, train: TrainConfig) -> None:
        super().__init__()
        self.samples, self.plan, self.micro_bsz, self.train_config = samples, plan, micro_bsz, train

    def train_dataloader(self) -> RunBatches:
        plan, train = self.plan, self.train_config
        batches = TrainBatches(
            self.samples,
            self.micro_bsz,
            group=self.trainer.global_rank // train.context_parallel,
            groups=train.groups,
            accumulate=train.accumulate_grad_batches,
            samples_seen=plan.first_sample,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
        return RunBatches(batches, (plan.total_steps - plan.first_step) * train.accumulate_grad_batches)
