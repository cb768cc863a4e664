"""A run's memory, part by part, and the files that it writes: formulas over its settings.

Optimizer and gradients are the engines', as in ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3): each
trained parameter has a float32 copy and two moments, 12 bytes in any precision; other optimizers than AdamW keep less.
The numbers named after others' constants are theirs, which import torch (tests/tools/plan/test_activations.py compares
them).
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

from ...cli.names import NONE, STATE
from ...cli.tables import GENERATIONS
from ...config import BUCKET, AdapterConfig, ModelConfig, RunConfig, TrainConfig, forms
from ...config.objective import TEACHER
from ...models.layout import time_state_shapes
from ...objectives.draws import Draws
from .activations import CPU, GPU, ITEM, METHODS, SINGLE, Activations, MethodFormula, has_kernels

DRAW, LOSS, BACKWARD, UPDATE = "draw", "loss", "backward", "update"  # the moments of a step; one of them is the peak
ALWAYS = (DRAW, LOSS, BACKWARD, UPDATE)
PAGE = 4096  # bytes of a page of a mapped file
# Bytes of a process without a model: Python, torch and, on several ranks, Lightning and DeepSpeed in main memory; on a
# GPU CUDA's context and the workspaces of its libraries, which no run here has measured.
PROCESS, CONTEXT = 640 << 20, 600 << 20
CHUNK_ELEMENTS = MappingProxyType({CPU: 1 << 25, GPU: 1 << 27})  # logits at once (objectives/cross_entropy.py)
ROW_ELEMENTS = MappingProxyType({CPU: 1 << 22, GPU: 1 << 26})  # dequantized at once (adapters/quant.py)
BLOCK_SIZES = MappingProxyType({"nf4": 64, "int8": 256})  # quantized weights that share a scale
ALIVE = 8  # times fewer tokens with a teacher's logits (objectives/divergence.py)
TAUGHT = MappingProxyType({2: 30, 4: 36})  # bytes an element of logits beside a teacher's, by bytes of an item
DRAWN = 24  # bytes an element of logits that draws a token
NUCLEUS = MappingProxyType({CPU: 40, GPU: 56})  # with --top_p; on a GPU with the graph's copy of the logits
PREFILL, ROOM = 4096, 1 << 30  # tokens of prompts in a pass; bytes of contexts that are kept
# Bytes a number that trains, of the optimizer; Muon keeps one moment of matrices
OPTIMIZER = MappingProxyType({"adamw": 12, "adamw8bit": 6, "muon": 12})
MATRIX = MappingProxyType({**OPTIMIZER, "muon": 8})
KEPT = 2  # checkpoints, without --keep_checkpoints


def keys_of(version: str) -> Any:
    """A generation's file of keys, imported without its model; its Family if it has no such file."""
    place = getattr(GENERATIONS, "places", {}).get(version)
    return import_module(f"rwkv_peft.{place.partition('.family')[0]}.keys") if place else GENERATIONS[version]()


def method_named(adapter: AdapterConfig) -> MethodFormula | None:
    """The formulas of an adapter's method; None without one."""
    if adapter.method == NONE:
        return None
    return METHODS[adapter.mode if len(forms(adapter.method)) > 1 else adapter.method]


class Counts(NamedTuple):
    """Numbers of elements in a model with its adapters: total: all parameters; trains: those that train; matrices:
    those that train in matrices of blocks and adapters; of_adapter: those of the adapters; quantized: those that are
    quantized; constants: the adapters' constants; live: parameters that ZeRO-3 keeps gathered; layers: adapted
    layers."""

    total: int
    trains: int
    matrices: int
    of_adapter: int
    quantized: int
    constants: int
    live: int
    layers: int


@functools.cache
def count(model: ModelConfig, adapter: AdapterConfig) -> Counts:
    """Count the parameters of a model (its dimensions) and an adapter, from shapes."""
    keys, method = keys_of(model.version), method_named(adapter)
    shapes = dict(keys.shapes(model))
    if STATE in adapter.train_parts:
        shapes |= time_state_shapes(model, adapter.state_parts)
    trains = matrices = of_adapter = adapted = constants = layers = 0
    blocks: dict[str, int] = {}
    for key, shape in shapes.items():
        size = math.prod(shape)
        part, _, rest = key.partition(".")
        inner = part == "blocks"
        is_matrix = inner and key.endswith(".weight") and len(shape) == 2 and min(shape) > 1
        if keys.part_of(key) in adapter.train_parts or method is None and not adapter.train_parts:
            trains += size
            matrices += size * is_matrix
        if method is not None and key.removesuffix(".weight").endswith(tuple(f".{name}" for name in adapter.targets)):
            added = method.trains(adapter, *shape)
            of_adapter, adapted, layers = of_adapter + added, adapted + size, layers + 1
            constants += method.constants(adapter, *shape)
            if min(getattr(adapter, name) for name in method.sizes) > 1:
                matrices += added - method.vectors(adapter, *shape)
            size += added
        place = rest.partition(".")[0] if inner else part
        blocks[place] = blocks.get(place, 0) + size
    total = sum(blocks.values())
    quantized = adapted if adapter.quant != "none" else 0
    largest = sorted(size for place, size in blocks.items() if place.isdigit())[-2:]
    live = max(sum(largest), blocks["emb"], blocks["head"])
    return Counts(total, trains + of_adapter, matrices, of_adapter, quantized, constants, live, layers)


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


@functools.cache
def activations_of(model: ModelConfig, adapter: AdapterConfig, train: TrainConfig, device: str) -> Activations:
    """The Activations of a model (its dimensions) and an adapter."""
    start, end = "blocks.0.", ".weight"
    linears = {
        key[len(start) : -len(end)]: shape
        for key, shape in keys_of(model.version).shapes(model).items()
        if key.startswith(start) and key.endswith(end) and len(shape) == 2
    }
    return Activations.of(model, linears, adapter, method_named(adapter), train, device)


@dataclass(frozen=True)
class Estimate:
    """A run's memory. config and accelerator (CPU or GPU) are the run's; file is the bytes of the base's tensors in its
    file (0: there is none), of `dtypes`; mapped is true if these are the dtype of the training, so that the file's
    pages serve as weights; teacher is the teacher's dimensions, or None."""

    config: RunConfig
    accelerator: str
    file: int = 0
    mapped: bool = True
    teacher: ModelConfig | None = None
    dtypes: frozenset[str] = frozenset()

    @staticmethod
    def teacher_of(config: RunConfig, teacher: ModelConfig | None) -> ModelConfig | None:
        """The dimensions of the model that a run learns from: the teacher's, or its own if it teaches itself."""
        objective = config.objective
        itself = TEACHER in objective.needs or (objective.of_tokens and objective.asks_base)
        return config.model if teacher is None and itself else teacher

    @property
    def counts(self) -> Counts:
        return count(self.config.model, self.config.adapter)

    @property
    def step(self) -> Activations:
        config = self.config
        return activations_of(config.model, config.adapter, config.train, self.accelerator)

    @property
    def item(self) -> int:
        """Bytes of an element of weights and activations."""
        return ITEM[self.config.train.precision]

    @property
    def ranks(self) -> int:
        return self.config.train.ranks

    def parts(self, rows: int = 0, tokens: int = 0) -> list[Part]:
        """The parts of one process at micro batches of `rows` samples of `tokens` tokens (0: the run's); a sample of
        two documents is two rows, and each answer to a prompt is one, with its share of the prompt. On a CPU all parts
        count at every moment: few fit into the gaps that freed ones leave in its heap."""
        data, train, here = self.config.data, self.config.train, self.accelerator
        rows, tokens = rows or data.micro_bsz, tokens or data.ctx_len
        parts = [Part("Python, torch, DeepSpeed", CPU, PROCESS)]
        if here == GPU:
            parts.append(Part("CUDA's context", GPU, CONTEXT))
        prompts, rows, drawn = rows, rows * data.documents, list[Part]()
        if data.of_prompts:
            prompt = max(1, tokens - data.max_completion_length)
            drawn = self.drawn(prompts, prompt)
            rows, whole = self.learned(prompts), rows
            tokens = data.max_completion_length + -(-prompt // min(rows, data.num_generations))
            sums = SINGLE * self.counts.trains if rows < whole else 0
            drawn.append(Part("gradients, summed over parts", here, sums))
        if train.chunk_ctx:
            tokens = min(tokens, train.chunk_ctx)
            parts.append(Part("gradients, summed over segments", here, SINGLE * self.counts.trains))
        elif train.context_parallel > 1:
            size = self.counts.trains * self.item
            parts.append(Part("gradients, before they are exchanged", here, size, (BACKWARD,)))
        tokens = -(-tokens // train.context_parallel)
        parts += [*self.weights(), *self.optimizer(), *self.batch(rows, tokens), *drawn, *self.taught(rows, tokens)]
        if here == CPU:
            parts = [part._replace(when=ALWAYS) for part in parts]
        return [part for part in parts if part.size]

    def weights(self) -> list[Part]:
        """The weights of the model, frozen and trained. ZeRO-3 shards both over the ranks."""
        counts, train, item, here = self.counts, self.config.train, self.item, self.accelerator
        share = self.ranks if train.stage == 3 else 1
        place = CPU if train.stage == 3 and train.offload else here
        tables = sum(map(math.prod, self.tables()))
        frozen = counts.total - counts.trains - counts.quantized + counts.constants - tables
        quantized = 0
        if kind := counts.quantized and self.config.adapter.quant:
            quantized = counts.quantized // (2 if kind == "nf4" else 1)
            quantized += SINGLE * -(-counts.quantized // BLOCK_SIZES[kind])
        dequantized = min(ROW_ELEMENTS[here], counts.quantized) * item
        moved = (counts.total - counts.of_adapter) * item if here == GPU and not self.mapped else 0
        return [
            Part("weights, frozen", place, frozen * item // share - self.unread()),
            Part("tables, frozen", CPU, 0 if self.mapped else tables * item),
            Part("weights, frozen and quantized", here, quantized),
            Part("weights that train", place, counts.trains * item // share),
            Part("rows that are dequantized", here, dequantized, (BACKWARD,)),
            Part("weights, on their way to the GPU", CPU, moved),
            Part("weights, gathered", here, counts.live * item if train.stage == 3 else 0),
        ]

    def optimizer(self) -> list[Part]:
        """Gradients and optimizer. ZeRO shards the optimizer over the ranks, and from stage 2 on the gradients too."""
        train, item, trains, matrices = self.config.train, self.item, self.counts.trains, self.counts.matrices
        share = trains // self.ranks
        place = CPU if train.offload else self.accelerator
        buffers = 2 if self.accelerator == GPU else 1  # a CPU touches the second only if the first is full
        accumulates = train.accumulate_grad_batches > 1
        apart = accumulates and train.stage == 2 and train.precision == "bf16"  # in float32 (training/zero.py)
        exchange = self.ranks > 1 or train.stage == 3 or train.offload
        bucket = min(BUCKET, trains) if exchange else 0
        beyond = (trains - bucket) // (self.ranks if train.stage >= 2 else 1)
        return [
            Part("optimizer", place, optimizer_size(train.optim, trains, matrices) // self.ranks),
            Part("updates, gathered", place, SINGLE * matrices if train.optim == "muon" else 0, (UPDATE,)),
            Part("gradients, in buckets", self.accelerator, buffers * bucket * item, (BACKWARD,)),
            Part("gradients beyond the buckets", self.accelerator, beyond * item, (BACKWARD,)),
            Part("gradients of the update, float32", place, SINGLE * share, (UPDATE,)),
            # flattened; with buckets, the pieces coexist with the flat copy
            Part("gradients of the update", self.accelerator, (2 if exchange else 1) * item * share, (UPDATE,)),
            Part("gradients, accumulated", place, (SINGLE if apart else item) * share if accumulates else 0),
        ]

    def batch(self, rows: int, tokens: int) -> list[Part]:
        """The parts that depend on the batch."""
        model, train, item, here = self.config.model, self.config.train, self.item, self.accelerator
        V, C, n = model.vocab_size, model.n_embd, rows * tokens
        chunk = max(1, CHUNK_ELEMENTS[here] // V)
        if self.teacher is None:
            logits = item if has_kernels(train.precision, here) else 2 * SINGLE  # the gradient takes their place
        else:
            chunk, logits = max(1, chunk // ALIVE), TAUGHT[item]
        chunk = min(n, chunk)
        of_tables = sum(min(size * width * item, n * (width * item + PAGE)) for size, width in self.tables())
        on_gpu = sum(n * width * item for _, width in self.tables())  # fetched before the blocks (models/parts.py)
        states = self.step.states(rows) if train.chunk_ctx else 0  # each segment hands its states on to the next
        head = 2 * SINGLE * V * C if self.trains("head") else 0  # a float32 sum, and a chunk's
        return [
            Part("embedding, rows that are read", here, min(self.unread(), n * (C * item + PAGE))),
            Part("tables, rows that are read", CPU, of_tables if self.mapped else 0),
            Part("tables, rows on the GPU", GPU, on_gpu if here == GPU else 0, (LOSS, BACKWARD)),
            Part("activations", here, self.step.kept(rows, tokens), (LOSS, BACKWARD)),
            Part("states of the layers", here, states, (LOSS,)),
            Part("work of a block", here, self.step.work(rows, tokens), (BACKWARD,)),
            Part("logits", here, chunk * V * logits, (LOSS,)),
            Part("hidden states of the loss", here, (n + 2 * chunk) * C * item, (LOSS,)),
            Part("gradient of the head", here, head, (LOSS,)),
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
        answers = self.learned(prompts)
        batch = min(objective.batch, prompts * config.data.num_generations * config.train.accumulate_grad_batches)
        before, after = (self.step.states(1, length) for length in (tokens, tokens + config.data.max_completion_length))
        read = self.step.kept(1, min(PREFILL, prompts * tokens)) // config.model.n_layer
        logits = config.model.vocab_size * ((NUCLEUS[here] if objective.top_p < 1 else DRAWN) + self.item)
        return [
            Part("states of the answers that are drawn", here, 2 * batch * after, (DRAW,)),
            Part("work of a block that reads prompts", here, read, (DRAW,)),
            Part("logits of drawing", here, batch * logits, (DRAW,)),
            Part("states, handed from prompts to answers", here, 2 * answers * before, (LOSS, BACKWARD)),
        ]

    def taught(self, rows: int, tokens: int) -> list[Part]:
        """The parts of a teacher, which is whole on each device unless the model teaches itself, as the base does for
        --kl_to_base. Its pass comes before the student's and keeps only the hidden states."""
        teacher, item, here, train = self.teacher, self.item, self.accelerator, self.config.train
        if teacher is None:
            return []
        frozen = AdapterConfig(method=NONE)
        step = activations_of(teacher, frozen, replace(train, grad_cp=False), here)
        weights = item * (count(teacher, frozen).total - sum(map(math.prod, tables_of(teacher))))
        contexts = self.config.data.of_contexts and (self.config.objective.teacher or train.stage < 3)
        name = "teacher" if TEACHER in self.config.objective.needs else "base"
        return [
            Part("weights of the teacher", here, weights if self.config.objective.teacher else 0),
            Part(f"work of a block of the {name}", here, step.kept(rows, tokens) // teacher.n_layer, (LOSS,)),
            Part("contexts that are kept, at most", CPU, ROOM if contexts else 0),
            Part(f"hidden states of the {name}", here, rows * tokens * teacher.n_embd * item, (LOSS,)),
        ]

    def unread(self) -> int:
        """Bytes of a frozen embedding in a mapped file, 0 without one; memory holds only the pages of rows that are
        read."""
        model = self.config.model
        mapped = self.accelerator == CPU and self.mapped and self.file and not self.trains("emb")
        return model.vocab_size * model.n_embd * self.item if mapped else 0

    def tables(self) -> list[tuple[int, ...]]:
        """Shapes (rows, width) of the frozen Tables, which stay in the base's file."""
        return [] if self.trains("emb") else tables_of(self.config.model)

    def trains(self, part: str) -> bool:
        """Return whether a part of the base trains: it is named, or all of the model trains."""
        adapter = self.config.adapter
        return part in adapter.train_parts or adapter.method == NONE and not adapter.train_parts

    def file_pages(self) -> int:
        """Bytes of the base's file that a process reads but does not keep: the system takes them back if it must."""
        if not self.mapped or self.accelerator == GPU:
            return self.file
        return min(self.file, (self.counts.quantized + self.counts.trains - self.counts.of_adapter) * self.item)


@functools.cache
def tables_of(model: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes (rows, width) of a model's Tables."""
    keys = keys_of(model.version)
    ends = getattr(keys, "EMBEDDINGS", getattr(keys, "tables", ()))
    return [shape for key, shape in keys.shapes(model).items() if key.endswith(ends)]


def optimizer_size(optim: str, trains: int, matrices: int) -> int:
    """Bytes of an optimizer's state for `trains` numbers, `matrices` of them in matrices."""
    return OPTIMIZER[optim] * (trains - matrices) + MATRIX[optim] * matrices


class Written(NamedTuple):
    """Files of one kind: size is the bytes of each, copies the most that are there at once."""

    name: str
    size: int
    copies: int


def written(estimate: Estimate) -> list[Written]:
    """The files of a run's folder. Sizes count tensors only."""
    config, counts, item = estimate.config, estimate.counts, estimate.item
    train, save = config.train, config.train.save_dtype
    parameters = counts.total - counts.of_adapter
    model = estimate.file if estimate.file and save not in ITEM else parameters * ITEM.get(save, item)
    epochs, keep = saved_epochs(train), KEPT if train.keep_checkpoints is None else train.keep_checkpoints
    between = bool(train.save_every or train.save_minutes)
    checkpoints = keep + 1 if keep else epochs  # the next is written before an old one goes
    labelled = min(epochs, keep + 1) if train.keep_checkpoints else epochs
    labelled += bool(train.val_data or train.val_split)  # the best; the newest is one of the epochs
    copies = labelled + between * checkpoints  # unless it was saved between them
    checkpoint = optimizer_size(train.optim, counts.trains, counts.matrices)
    if not config.adapter.whole_model:
        name, size = "adapter.safetensors, and one an epoch", (counts.trains + counts.constants) * item
    else:
        name, size = "rwkv.pth, and one an epoch", model
        if not ({save} if save in ITEM else estimate.dtypes) <= {"fp32", train.precision}:
            copies, checkpoint = labelled + between, checkpoint + parameters * item  # each has weights of its own
    files = [Written(name, size, copies)]
    if STATE in config.adapter.train_parts:
        states = sum(map(math.prod, time_state_shapes(config.model, config.adapter.state_parts).values())) * item
        files.append(Written("state.pth, and one an epoch", states, labelled + between))
    if train.merge_on_save:
        files.append(Written("merged.pth, and one an epoch", model, labelled + between))
    more = between and not keep
    return [*files, Written("checkpoints, or more" if more else "checkpoints", checkpoint, checkpoints)]


def saved_epochs(train: TrainConfig) -> int:
    """The number of epochs that are saved, the last included."""
    first, last, every = train.epoch_begin, train.epoch_count, train.epoch_save
    regular = last // every - first // every if every and last > first else 0
    return regular + bool(last > first and (not every or last % every))
