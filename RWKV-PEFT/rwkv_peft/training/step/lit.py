"""The training step as a LightningModule: loss, learning rate, optimizer, and the sums over all ranks."""

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from ...adapters.groups import LearningRates, parameter_groups
from ...config import TrainConfig
from ...data.batches import TrainBatch
from ..optimizers import make_optimizer
from .shared_prefix import tokens_read
from .steps import Step, seed_micro_batch


class Diverged(Exception):
    """A loss, gradient norm or trained tensor is not finite; all ranks raise it before that step is saved."""


class Lit(pl.LightningModule):
    """Trains `model` (adapters injected) by a TrainConfig, optimizer steps numbered from first_step.

    compute makes the loss of a batch of TrainBatches; family and ratios as parameter_groups takes them. Every counted
    token of an optimizer step weighs the same, whatever the number of ranks and micro batches: batches have the count
    of the whole step as step_count.

    step: the current optimizer step. step_loss: the mean loss of its micro batches so far, over all ranks;
    step_measures: the same mean of compute's other measures, by name. step_tokens: the objective's items that count in
    the step. micro_tokens: the tokens that all ranks read in the micro batch, padding included. stop_requested: the
    signal that requested a stop, 0 for none; set on any rank, it makes `stopping` true on all of them in the same micro
    batch. save_requested makes `saving` true likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        compute: Step,
        total_steps: int,
        first_step: int = 0,
        family: LearningRates | None = None,
        ratios: Iterable[tuple[str, float]] = (),
    ) -> None:
        super().__init__()
        self.model, self.train_config, self.total_steps = model, train, total_steps
        self.step, self.family, self.ratios, self.compute = first_step, family, ratios, compute
        self.step_loss, self.step_tokens, self.micro_tokens = 0.0, 0, 0
        self.step_measures: dict[str, float] = {}
        self.stop_requested = 0
        self.stopping = False
        self.save_requested = self.saving = False

    @property
    def lr(self) -> float:
        """The current step's base learning rate."""
        return self.lr_at(self.step)

    def lr_at(self, step: int) -> float:
        """The base learning rate of a step."""
        return self.train_config.rate_at(step, self.total_steps)

    def groups(self) -> list[dict[str, Any]]:
        """The trained parameters as optimizer groups."""
        train = self.train_config
        return parameter_groups(self.model, train.weight_decay, self.family, self.ratios, train.optim == "muon")

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.groups(), self.train_config)

    def on_train_batch_start(self, batch: TrainBatch, batch_idx: int) -> None:
        accumulate = self.train_config.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            self.step_loss, self.step_tokens, self.step_measures = 0.0, batch["step_count"], {}
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * group["lr_scale"]
        place = batch_idx % accumulate * self.trainer.world_size + self.global_rank
        seed_micro_batch(self.train_config.random_seed, self.step * accumulate * self.trainer.world_size + place)

    def transfer_batch_to_device(self, batch: TrainBatch, device: torch.device, dataloader_idx: int) -> TrainBatch:
        return self.compute.prepare_inputs(batch, device)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> torch.Tensor:
        # The engine averages gradients over ranks and micro batches; this denominator turns that into the mean over
        # the counted tokens of the whole step.
        parts = self.trainer.world_size * self.train_config.accumulate_grad_batches
        whole = self.compute.complete_batch(self.model, batch)
        loss = self.compute.loss(self.model, whole, (batch["step_count"] or 1) / parts)
        self.reduce_status(loss.detach(), tokens_read(whole))
        # Lightning and the engine both divide by the number of micro batches; once is right.
        return loss * self.train_config.accumulate_grad_batches

    def reduce_status(self, loss: torch.Tensor, tokens: int) -> None:
        """Start the micro batch's one small sum over ranks: loss, measures, tokens, and requests to stop or save."""
        numbers = [number.float() for number in (loss, *self.compute.measures.values())]
        # Filled on the device, because copying a number to a GPU would wait for the GPU.
        others = [numbers[0].new_full((), n) for n in (tokens, self.stop_requested != 0, self.save_requested)]
        self.status = torch.stack([*numbers, *others])
        if self.trainer.world_size > 1:
            dist.all_reduce(self.status)

    def on_after_backward(self) -> None:
        """Read the sums over ranks: before the optimizer's step, and after backward, because it waits for the GPU."""
        total, *measures, tokens, stop, save = self.status.tolist()
        if not math.isfinite(total):
            raise Diverged(f"the loss became {total} at step {self.step + 1}")
        parts = self.trainer.world_size * self.train_config.accumulate_grad_batches
        self.step_loss += total / parts
        for name, measure in zip(self.compute.measures, measures):
            self.step_measures[name] = self.step_measures.get(name, 0.0) + measure / parts
        self.micro_tokens, self.stopping, self.saving = int(tokens), stop > 0, save > 0

    def on_train_batch_end(self, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        if (batch_idx + 1) % self.train_config.accumulate_grad_batches == 0:
            self.step += 1
            self.compute.figures = self.step_measures
