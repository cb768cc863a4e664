"""Losses while training: of held-out samples, by which the best adapter is chosen and early stopping ends a run, and of
data to retain."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ...checkpoints.best import BEST
from ...data.answer_samples import mismatched_answers
from ...data.batches import EvalBatches
from ...data.mixture import Several
from ...data.samples import Samples
from ..inputs import VALIDATION, Inputs
from ..saving.optimizer_state import averaged
from ..saving.saver import Saver
from ..step.compiling import uncompiled

if TYPE_CHECKING:
    from ..step.lit import Lit


class Validator:
    """Goes once through the samples of each data set, VALIDATION and RETAINED, every val_every steps (0: every epoch)
    and after the last one. All ranks call it after each step.

    A new lowest loss of VALIDATION saves the trained tensors under the label BEST. After early_stop validations in a
    row without one (0: never) `exhausted` is true.
    """

    def __init__(self, inputs: Inputs, saver: Saver) -> None:
        self.measured, self.plan, self.lowest, self.anew = inputs.measured, inputs.plan, inputs.lowest, not inputs.state
        self.saver, self.train = saver, inputs.config.train
        self.of_tokens, self.micro_bsz = inputs.config.objective.of_tokens, inputs.config.data.micro_bsz
        self.swapped: Sequence[Sequence[float]] = ()  # (loss behind its own prompt, behind another's) of each answer
        self.every = self.train.val_every or inputs.plan.epoch_steps

    @property
    def exhausted(self) -> bool:
        return self.lowest.exhausts(self.train.early_stop)

    def before(self, trainer: Any, lit: "Lit") -> dict[str, float]:
        """The losses before a run's first step, {"val_start", "retain_start"}; {} if it is resumed."""
        if not self.anew:
            return {}
        sums = {name: [self.sums(part, trainer, lit) for part in found.parts] for name, found in self.measured.items()}
        return {f"{name}_start": means([sum(each) for each in zip(*found)])[0] for name, found in sums.items()}

    def __call__(self, trainer: Any, lit: "Lit", done: int) -> dict[str, float]:
        """{"val_loss"}, with the step's other measures or else the perplexity "val_ppl", and the same of RETAINED as
        "retain_…"; of several data sets also "val_loss/NAME". {} if this step does not validate."""
        if done % self.every and done != self.plan.total_steps:
            return {}
        found: dict[str, float] = {}
        with averaged(trainer.optimizers[0]):
            for name, samples in self.measured.items():
                sums = [self.sums(part, trainer, lit) for part in samples.parts]
                loss, *numbers = means([sum(each) for each in zip(*sums)])
                measures = dict(zip(lit.compute.measures, numbers)) or {"ppl": math.exp(min(loss, 700.0))}
                found |= {f"{name}_loss": loss, **{f"{name}_{word}": value for word, value in measures.items()}}
                if isinstance(samples, Several):
                    found |= {f"{name}_loss/{of}": means(each)[0] for of, each in zip(samples.sources, sums)}
            if VALIDATION in self.measured and self.lowest.note(found[f"{VALIDATION}_loss"]):
                self.saver.save_tensors(trainer, lit, [BEST])
        return found

    def after(self, trainer: Any, lit: "Lit") -> None:
        """Measure the held-out answers behind their own prompts and behind others, once the last step is done."""
        if VALIDATION not in self.measured or not self.of_tokens:
            return
        pairs = mismatched_answers(self.measured[VALIDATION])
        with averaged(trainer.optimizers[0]):
            self.swapped = [[means(self.sums(one, trainer, lit, 1))[0] for one in pair] for pair in pairs]

    @torch.no_grad()
    def sums(self, samples: Samples, trainer: Any, lit: "Lit", rows: int = 0) -> list[float]:
        """[the items that count, sums over them of the loss and of the step's other measures], over all ranks."""
        device, train = trainer.strategy.root_device, self.train
        sums: list[torch.Tensor] = []
        lit.model.eval()
        group = trainer.global_rank // train.context_parallel
        for batch in EvalBatches(samples, rows or self.micro_bsz, group, train.groups):
            batch = lit.compute.prepare_inputs(batch, device)
            with uncompiled(train.compile):
                loss = lit.compute.total(lit.model, batch)
            numbers = (lit.compute.items(batch), loss, *lit.compute.measures.values())
            sums.append(torch.stack([number.double() for number in numbers]))
        lit.model.train()
        total = torch.stack(sums).sum(0)
        if trainer.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()


def means(sums: Sequence[float]) -> list[float]:
    """[items, sum, …] -> [mean, …]."""
    items, *others = sums
    return [other / (items or 1.0) for other in others]
