"""A run's memory, part by part: formulas over the numbers of a rehearsal.

Optimizer and gradients are DeepSpeed's (ZeRO; Rajbhandari et al. 2020, arXiv 1910.02054, section 3): each trained
parameter has a float32 copy and two moments, 12 bytes in any precision; other optimizers than AdamW keep less.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ...adapters.quant import GPU_ROW_ELEMENTS, ROW_ELEMENTS, stored_bytes
from ...checkpoints.tensors import DTYPES
from ...cli.names import NONE
from ...config import BUCKET, AdapterConfig, ModelConfig, RunConfig
from ...inference.forward import PREFILL
from ...models import family_named
from ...models.state import State
from ...objectives.cross_entropy import chunk_rows
from ...objectives.divergence import taught_rows
from ...objectives.draws import Draws
from ...training.saving.products import optimizer_size
from ...training.step.contexts import ROOM
from ...training.step.zero import exchanges_gradients, sums_apart
from .rehearsal import Counts, Step, count, drawing_bytes, logit_bytes, rehearse

CPU, GPU = "cpu", "gpu"
DRAW, LOSS, BACKWARD, UPDATE = "draw", "loss", "backward", "update"  # the moments of a step; one of them is the peak
ALWAYS = (DRAW, LOSS, BACKWARD, UPDATE)
PAGE = 4096  # bytes of a page of a mapped file
SUM = 4  # bytes of a float32 sum of gradients
# Bytes of a process without a model: Python, torch, Lightning and DeepSpeed in main memory; on a GPU CUDA's context
# and the workspaces of its libraries, which no run here has measured.
PROCESS, CONTEXT = 640 << 20, 600 << 20


class Part(NamedTuple):
    """Bytes of one process on a device (CPU or GPU), held at the given moments of a step."""

    name: str
    device: str
    size: int
    when: tuple[str, ...] = ALWAYS


def peak(parts: Iterable[Part], device: str) -> int:
    """The most bytes that a device holds at one moment."""
    here = [part for part in parts if part.device == device]
    return max(sum(part.size for part in here if moment in part.when) for moment in ALWAYS)


@dataclass(frozen=True)
class Estimate:
    """A run's memory. config and accelerator (CPU or GPU) are the run's; counts, step and logits (bytes a token of the
    loss) come from a rehearsal; file is the bytes of the base's tensors in its file (0: there is none), mapped whether
    they have the dtype of the training, so that the file's pages serve as weights; teacher is that of the run, or
    None."""

    config: RunConfig
    accelerator: str
    counts: Counts
    step: Step
    logits: float
    file: int = 0
    mapped: bool = True
    teacher: ModelConfig | None = None

    @classmethod
    def of(
        cls, config: RunConfig, accelerator: str, file: int = 0, mapped: bool = True, teacher: ModelConfig | None = None
    ) -> "Estimate":
        """Rehearse a RunConfig; the rest as in the class."""
        model, adapter, train = config.model, config.adapter, config.train
        family, dtype = family_named(model.version), DTYPES[train.precision]
        device = "cpu" if accelerator == CPU else "meta"
        dense = replace(adapter, quant="none", load="", init="")
        step = rehearse(family, model, dense, dtype, torch.device(device), train.grad_cp)
        counts = count(family, model, adapter)
        logits = logit_bytes(model.vocab_size, dtype, device, teacher is not None)
        return cls(config, accelerator, counts, step, logits, file, mapped, teacher)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.train.precision]

    @property
    def ranks(self) -> int:
        return self.config.train.ranks

    def parts(self, rows: int, tokens: int) -> list[Part]:
        """The parts of one process at micro batches of `rows` samples of `tokens` tokens; a sample of two documents is
        two rows, and each answer to a prompt is one, with its share of the prompt. On a CPU all parts count at every
        moment, because few fit into the gaps that freed ones leave in its heap."""
        data, prompts = self.config.data, rows
        rows *= data.documents
        drawn: list[Part] = []
        if data.of_prompts:
            prompt = max(1, tokens - data.max_completion_length)
            drawn = self.drawn(prompts, prompt)
            rows, whole = self.learned(prompts), rows
            tokens = data.max_completion_length + -(-prompt // min(rows, data.num_generations))
            sums = SUM * self.counts.trains if rows < whole else 0
            drawn.append(Part("gradients, summed over parts", self.accelerator, sums))
        process = [Part("Python, torch, DeepSpeed", CPU, PROCESS)]
        if self.accelerator == GPU:
            process.append(Part("CUDA's context", GPU, CONTEXT))
        train = self.config.train
        if train.chunk_ctx:
            tokens = min(tokens, train.chunk_ctx)
            process.append(Part("gradients, summed over segments", self.accelerator, SUM * self.counts.trains))
        elif train.context_parallel > 1:
            size = self.counts.trains * self.dtype.itemsize
            process.append(Part("gradients, before they are exchanged", self.accelerator, size, (BACKWARD,)))
        tokens = -(-tokens // train.context_parallel)
        found = [*process, *self.weights(), *self.optimizer(), *self.batch(rows, tokens), *drawn]
        found += self.taught(rows, tokens)
        if self.accelerator == CPU:
            found = [part._replace(when=ALWAYS) for part in found]
        return [part for part in found if part.size]

    def weights(self) -> list[Part]:
        """The weights of the model, frozen and trained. ZeRO-3 shards both over the ranks."""
        counts, train, item = self.counts, self.config.train, self.dtype.itemsize
        share = self.ranks if train.stage == 3 else 1
        place = CPU if train.stage == 3 and train.offload else self.accelerator
        tables = sum(map(math.prod, self.tables()))
        frozen = counts.total - counts.trains - counts.quantized + counts.constants - tables
        quantized = stored_bytes(counts.quantized, self.config.adapter.quant) if counts.quantized else 0
        parts = [
            Part("weights, frozen", place, frozen * item // share - self.unread()),
            Part("tables, frozen", CPU, 0 if self.mapped else tables * item),
            Part("weights, frozen and quantized", self.accelerator, quantized),
            Part("weights that train", place, counts.trains * item // share),
        ]
        if counts.quantized:
            rows = min(GPU_ROW_ELEMENTS if self.accelerator == GPU else ROW_ELEMENTS, counts.quantized)
            parts.append(Part("rows that are dequantized", self.accelerator, rows * item, (BACKWARD,)))
        if self.accelerator == GPU and not self.mapped:
            whole = (counts.total - counts.own) * item
            parts.append(Part("weights, on their way to the GPU", CPU, whole))
        if train.stage == 3:
            parts.append(Part("weights, gathered", self.accelerator, counts.live * item))
        return parts

    def optimizer(self) -> list[Part]:
        """Gradients and optimizer. ZeRO shards the optimizer over the ranks, and from stage 2 on the gradients too."""
        train, item, trains = self.config.train, self.dtype.itemsize, self.counts.trains
        own = trains // self.ranks
        place = CPU if train.offload else self.accelerator
        buffers = 2 if self.accelerator == GPU else 1  # a CPU touches the second only if the first is full
        exchange = exchanges_gradients(train)
        bucket = min(BUCKET, trains) if exchange else 0
        beyond = (trains - bucket) // (self.ranks if train.stage >= 2 else 1)
        parts = [
            Part("optimizer", place, optimizer_size(train.optim, trains, self.counts.matrices) // self.ranks),
            Part("updates, gathered", place, 4 * self.counts.matrices if train.optim == "muon" else 0, (UPDATE,)),
            Part("gradients, in buckets", self.accelerator, buffers * bucket * item, (BACKWARD,)),
            Part("gradients beyond the buckets", self.accelerator, beyond * item, (BACKWARD,)),
            Part("gradients of the update, float32", place, 4 * own, (UPDATE,)),
            # flattened; with buckets, the pieces coexist with the flat copy
            Part("gradients of the update", self.accelerator, (2 if exchange else 1) * item * own, (UPDATE,)),
        ]
        if train.accumulate_grad_batches > 1:
            size = 4 if sums_apart(train) else item
            parts.append(Part("gradients, accumulated", place, size * own))
        return parts

    def batch(self, rows: int, tokens: int) -> list[Part]:
        """The parts that depend on the batch."""
        model, item, here = self.config.model, self.dtype.itemsize, self.accelerator
        at_once = chunk_rows if self.teacher is None else taught_rows
        chunk = min(rows * tokens, at_once(model.vocab_size, here == GPU))
        hidden = (rows * tokens + 2 * chunk) * model.n_embd * item
        read = min(self.unread(), rows * tokens * (model.n_embd * item + PAGE))
        of_tables = (min(size * width, rows * tokens * (width + PAGE / item)) for size, width in self.tables())
        segment = self.config.train.chunk_ctx  # each segment hands its states on to the next
        return [
            Part("embedding, rows that are read", here, read),
            Part("tables, rows that are read", CPU, round(sum(of_tables) * item) if self.mapped else 0),
            Part("activations", here, self.step.kept.at(rows, tokens), (LOSS, BACKWARD)),
            Part("states of the layers", here, self.step.states.at(rows, tokens) if segment else 0, (LOSS,)),
            Part("work of a block", here, self.step.work.at(rows, tokens), (BACKWARD,)),
            Part("logits", here, round(chunk * self.logits), (LOSS,)),
            Part("hidden states of the loss", here, hidden, (LOSS,)),
            Part("gradient of the head", here, self.head_gradient(), (LOSS,)),
        ]

    def learned(self, prompts: int) -> int:
        """The number of answers that are learned at a time, of so many prompts of a micro batch."""
        objective, answers = self.config.objective, prompts * self.config.data.num_generations
        assert isinstance(objective, Draws)  # because others do not take prompts
        return min(objective.learned or answers, answers)

    def drawn(self, prompts: int, tokens: int) -> list[Part]:
        """The parts of drawing answers to so many prompts of a micro batch, and of learning them, each from a copy of
        its prompt's state, which has a gradient. A step of drawing has the states before and after it."""
        config, here, objective = self.config, self.accelerator, self.config.objective
        assert isinstance(objective, Draws)  # because others do not take prompts
        model, answers = config.model, self.learned(prompts)
        batch = min(objective.batch, prompts * config.data.num_generations * config.train.accumulate_grad_batches)
        before, state = (
            State.zeros(model, 1, "meta", self.dtype, length).nbytes
            for length in (tokens, tokens + config.data.max_completion_length)
        )
        read = self.step.kept.at(1, min(PREFILL, prompts * tokens)) // model.n_layer
        logits = drawing_bytes(model.vocab_size, objective.top_p) + model.vocab_size * self.dtype.itemsize
        return [
            Part("states of the answers that are drawn", here, 2 * batch * state, (DRAW,)),
            Part("work of a block that reads prompts", here, read, (DRAW,)),
            Part("logits of drawing", here, round(batch * logits), (DRAW,)),
            Part("states, handed from prompts to answers", here, 2 * answers * before, (LOSS, BACKWARD)),
        ]

    def taught(self, rows: int, tokens: int) -> list[Part]:
        """The parts of a teacher, which is whole on each device unless the model teaches itself, and whose pass comes
        before the student's and keeps only the hidden states; none if its word is stored."""
        teacher, dtype, here = self.teacher, self.dtype, self.accelerator
        if teacher is None or self.config.objective.stored:
            return []
        family = family_named(teacher.version)
        device = torch.device("cpu" if here == CPU else "meta")
        step = rehearse(family, teacher, AdapterConfig(method=NONE), dtype, device, False)
        shapes = family.shapes(teacher).items()
        weights = sum(math.prod(shape) for key, shape in shapes if not key.endswith(family.tables))
        contexts = self.config.data.of_contexts and (self.config.objective.teacher or self.config.train.stage < 3)
        return [
            Part("weights of the teacher", here, weights * dtype.itemsize if self.config.objective.teacher else 0),
            Part("work of a block of the teacher", here, step.kept.at(rows, tokens) // teacher.n_layer, (LOSS,)),
            Part("contexts that are kept, at most", CPU, ROOM if contexts else 0),
            Part("hidden states of the teacher", here, rows * tokens * teacher.n_embd * dtype.itemsize, (LOSS,)),
        ]

    def unread(self) -> int:
        """Bytes of a frozen embedding in a mapped file, 0 without one; memory holds only the pages of rows that are
        read."""
        model = self.config.model
        mapped = self.accelerator == CPU and self.mapped and self.file and not self.trains("emb")
        return model.vocab_size * model.n_embd * self.dtype.itemsize if mapped else 0

    def tables(self) -> list[tuple[int, ...]]:
        """Shapes (rows, width) of the frozen Tables, which stay in the base's file."""
        model = self.config.model
        family = family_named(model.version)
        shapes = family.shapes(model).items() if not self.trains("emb") else ()
        return [shape for key, shape in shapes if key.endswith(family.tables)]

    def head_gradient(self) -> int:
        """Bytes of the head's gradient if the head trains, else 0: a float32 sum, and what a chunk adds to it."""
        model = self.config.model
        return 2 * 4 * model.vocab_size * model.n_embd if self.trains("head") else 0

    def trains(self, part: str) -> bool:
        """Tell whether a part of the base trains: it is named, or all of the model trains."""
        adapter = self.config.adapter
        return part in adapter.train_parts or adapter.method == NONE and not adapter.train_parts

    def file_pages(self) -> int:
        """Bytes of the base's file that a process reads but does not keep: the system takes them back if it must."""
        if not self.mapped or self.accelerator == GPU:
            return self.file
        return min(self.file, (self.counts.quantized + self.counts.trains - self.counts.own) * self.dtype.itemsize)
