"""Bytes that a training step holds besides weights, gradients and optimizer: formulas of each generation and method.

The forward pass keeps the tensors that autograd Functions save; the backward pass needs gradients of activations on
top. Both are linear in the tokens, and follow from the forward functions of the models (models/*/model.py) and methods
(adapters/functions/). Numbers are elements a token, in the run's dtype, except where a name has bytes.
T tokens, C n_embd, A dim_att, F dim_ffn, N head size, D attention_size or deep_size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from ...config import AdapterConfig, TrainConfig

CPU, GPU = "cpu", "gpu"
ITEM = MappingProxyType({"bf16": 2, "fp16": 2, "fp32": 4})  # bytes of an element by --precision
SINGLE = 4  # bytes of a float32 number
HEAD_SIZE = 64  # of the GPU kernels of a recurrence; others convert to float32
GPU_BLOCKS = 256  # blocks of a sum over tokens, each of which has a part of its own
# Elements / C that plain torch keeps, and needs at once, beyond the kernels of token shift, gates and norms: upper
# bounds.
PLAIN_KEPT, PLAIN_WORK = 20, 5


def has_kernels(precision: str, device: str) -> bool:
    """True if the models' kernels take a precision: none takes fp16, and a GPU's take bf16 alone."""
    return precision == "bf16" or (precision == "fp32" and device == CPU)


Count = Callable[[AdapterConfig, int, int], int]  # (settings, out, in) of a layer -> a number of elements


def none(a: AdapterConfig, out: int, in_: int) -> int:
    return 0


class MethodFormula(NamedTuple):
    """A method in a layer (out, in): the numbers that train, `vectors` of them no matrices to Muon, and the constants;
    if its size fits; the settings that give its size. It keeps the layer's input if `input`, `extra` elements a token
    and `fixed` ones in all; its backward needs `work` at once, and a copy of the output if it `turns` it."""

    trains: Count
    vectors: Count = none
    constants: Count = none
    fits: Callable[[AdapterConfig, int, int], bool] = lambda a, out, in_: True
    sizes: tuple[str, ...] = ("rank",)
    input: bool = True
    extra: Count = none
    fixed: Count = none
    work: Count = none
    turns: bool = False


def factors(a: AdapterConfig, out: int, in_: int) -> int:
    """Numbers of two factors (rank, in) and (out, rank)."""
    return a.rank * (out + in_)


def inner(a: AdapterConfig, out: int, in_: int) -> int:
    return a.rank


BONE = MethodFormula(lambda a, out, in_: a.rank * out, fits=lambda a, out, in_: a.rank <= in_, input=False, extra=inner)
BAT_IN = MethodFormula(
    lambda a, out, in_: a.rank * in_,
    fits=lambda a, out, in_: not (out % a.rank or in_ % a.rank),
    work=lambda a, out, in_: 2 * a.rank * (GPU_BLOCKS * a.rank + in_),  # float32 parts of a gradient
)
LORA = MethodFormula(factors, fits=lambda a, out, in_: a.rank <= min(out, in_), extra=inner)
METHODS: Mapping[str, MethodFormula] = MappingProxyType(
    {
        "bone": BONE,
        "bone-mini": BONE._replace(
            trains=lambda a, out, in_: a.rank * a.mini_rank,
            fits=lambda a, out, in_: a.rank <= in_ and a.mini_rank > 0 and not out % a.mini_rank,
            sizes=("rank", "mini_rank"),
        ),
        "bone-signed": BONE._replace(constants=lambda a, out, in_: in_, fixed=lambda a, out, in_: a.rank * in_),
        "bat-in": BAT_IN,
        "bat-out": BAT_IN._replace(trains=BONE.trains, work=lambda a, out, in_: 2 * out * in_),  # W' and its gradient
        "lora": LORA,
        "lora-plus": LORA,
        "rslora": LORA,
        "dora": LORA._replace(
            trains=lambda a, out, in_: factors(a, out, in_) + out,
            vectors=lambda a, out, in_: out,
            constants=lambda a, out, in_: out,
            extra=lambda a, out, in_: a.rank + out,
            turns=True,
        ),
        "pissa": LORA._replace(constants=factors),
        "olora": LORA._replace(constants=factors),
        "lora-ga": LORA._replace(constants=factors, fits=lambda a, out, in_: a.rank <= min(out, in_) // 2),
    }
)


class LayerFormula(NamedTuple):
    """A linear layer's share, as in MethodFormula: reads is its input if that is kept, turned its output if it turns
    it."""

    reads: int = 0
    extra: int = 0
    fixed: int = 0
    work: int = 0
    turned: int = 0

    @classmethod
    def of(cls, a: AdapterConfig, method: MethodFormula | None, trains: bool, out: int, in_: int) -> "LayerFormula":
        """The LayerFormula of a weight (out, in) that has an adapter, or trains itself, or is frozen."""
        if method is None:
            return cls(in_, work=out * in_) if trains else cls()
        extra, fixed, work = (number(a, out, in_) for number in (method.extra, method.fixed, method.work))
        if a.dropout:  # hides inputs: the mask, and what is left
            return cls(0, extra + 2 * in_, fixed, work)
        return cls(in_ if method.input else 0, extra, fixed, work, out if method.turns else 0)

    @property
    def kept(self) -> int:
        return self.reads + self.extra


class BlockFormula(NamedTuple):
    """A block's elements a token. kept: those for backward; first: those that block 0 lacks, as its input needs
    no gradient; peak: those that backward needs beyond all that is kept, at most, and early: at the last
    linear layer, where `work` fixed elements come on top. carried: tensors (T, C) that blocks hand on besides x."""

    kept: int
    first: int
    peak: int
    early: int
    work: int
    carried: int = 0


class Facts(NamedTuple):
    """The facts that a block's formula takes: dimensions, linear layers by name, the parts that train ("time": the
    mixes' own parameters; "before": those before block 0, or its norms; "emb"), and `wide`, true if the recurrence
    converts its tensors to float32."""

    model: Any
    layers: Mapping[str, LayerFormula]
    time: bool
    before: bool
    emb: bool
    wide: bool

    def sum_of(self, mix: str) -> int:
        """Elements that the linear layers of a mix keep, "att" or "ffn"."""
        return sum(layer.kept for name, layer in self.layers.items() if name.startswith(f"{mix}."))

    def recurring(self, tensors: int, gradients: int) -> int:
        """Elements in the recurrence's backward beyond those kept before it: gradients of the block's output and of
        `gradients` tensors; if it is wide, float32 copies of y, of its `tensors` and of their gradients."""
        A = self.model.dim_att
        return self.model.n_embd + gradients * A + self.wide * 2 * (1 + 2 * tensors) * A


def rwkv6(facts: Facts) -> BlockFormula:
    m, time, layers = facts.model, facts.time, facts.layers
    C, A, F, low = m.n_embd, m.dim_att, m.dim_ffn, 5 * m.maa_rank + m.decay_rank
    key, value, gate = (layers[f"ffn.{name}"] for name in ("key", "value", "receptance"))
    ffn = 2 * C + key.kept + gate.kept + F + value.extra + 2 * C  # x, its norm; relu_square's result; sigmoid_gate
    att = 2 * C + low + 4 * A + 2 * A + facts.sum_of("att")  # x, its norm; after tanh; r k v w; y, g
    att += 2 * C * time  # what w1 and time_decay_w1 multiply
    peak = max(2 * F + key.turned - gate.kept - value.extra, facts.recurring(4, 4) - ffn)
    first = 0 if facts.before else C if time else 2 * C + low
    return BlockFormula(att + ffn, first, peak, F + C - gate.kept, value.work)


def rwkv7(facts: Facts) -> BlockFormula:
    m, time, layers = facts.model, facts.time, facts.layers
    C, F, low = m.n_embd, m.dim_ffn, m.decay_rank + m.gate_rank
    key, value = layers["ffn.key"], layers["ffn.value"]
    ffn = 2 * C + key.kept + F + value.extra  # x, its norm; relu_square's result
    att = 2 * C + low + 4 * C + 6 * C + 2 * C + facts.sum_of("att")  # value_residual, delta_keys; r w k v a b; y, g
    att += (4 * C - layers["att.value"].reads + m.iclr_rank + m.value_rank) * time  # what w1 a1 v1 g1 a2 v2 multiply
    peak = max(C + 2 * F + key.turned - value.extra, facts.recurring(6, 9) - ffn)
    first = 2 * C + m.value_rank * time + (0 if facts.before else C if time else 2 * C + low)
    return BlockFormula(att + ffn, first, peak, C + F, value.work, 1)


def rwkv7a(facts: Facts) -> BlockFormula:
    """RWKV-7's, and a gate (F) of a matrix (D, D) a token before the last layer."""
    plain, m, value = rwkv7(facts), facts.model, facts.layers["ffn.value"]
    C, F, D = m.n_embd, m.dim_ffn, m.deep_size
    kept = plain.kept + D * D + D * (facts.before or facts.time) + F + value.reads
    peak = max(plain.peak - value.reads - F, C + 3 * F - value.kept) + C * facts.emb
    return plain._replace(kept=kept, peak=peak, carried=2)


def rwkv7b(facts: Facts) -> BlockFormula:
    """RWKV-7a's, and attention on the block's input, with scores recomputed in backward."""
    plain, m, query = rwkv7a(facts), facts.model, facts.layers["qkv.qq"]
    C, D = m.n_embd, m.attention_size
    of_keys = D + 2 * C + 2 * (D + C)  # products with the tokens' factors; before token shift; before the norms
    kept = of_keys + 4 * D + C + query.extra + D * facts.before
    kept += (m.attention_key_rank + m.attention_value_rank) * facts.time
    first = plain.first - (0 if facts.before or not (facts.time or query.reads) else C)
    first += 0 if facts.before or facts.time else of_keys
    return plain._replace(kept=plain.kept + kept, first=first)


def unknown(facts: Facts) -> BlockFormula:
    """An upper bound for a generation without a formula, from its widths."""
    m = facts.model
    widths = 16 * (m.n_embd + m.dim_att) + 4 * m.dim_ffn
    return BlockFormula(widths + facts.sum_of("att") + facts.sum_of("ffn"), 0, widths, widths, 0, 2)


BLOCKS = MappingProxyType({"x060": rwkv6, "x070": rwkv7, "x070a": rwkv7a, "x070b": rwkv7b})


@dataclass(frozen=True)
class Activations:
    """Bytes of a step of a model (its dimensions) on a device. item: bytes of an element; fixed: elements that the
    layers of a block keep whatever the tokens; start and end: elements a token that the embedding's norm, and the last
    norm and the head, keep."""

    model: Any
    device: str
    item: int
    grad_cp: bool
    block: BlockFormula
    fixed: int
    start: int
    end: int

    @classmethod
    def of(
        cls,
        model: Any,
        linears: Mapping[str, tuple[int, ...]],
        adapter: AdapterConfig,
        method: MethodFormula | None,
        train: TrainConfig,
        device: str,
    ) -> "Activations":
        """linears {name: (out, in)} are the linear layers of a block; method is the adapter's, or None."""
        C, precision, item = model.n_embd, train.precision, ITEM[train.precision]
        all_trains = method is None and not adapter.train_parts
        time, norms, emb, head = (all_trains or part in adapter.train_parts for part in ("time", "ln", "emb", "head"))
        layers = {}
        for name, shape in linears.items():
            formula, trains = method if name in adapter.targets else None, emb if "emb" in name else all_trains
            layers[name] = LayerFormula.of(adapter, formula, trains, *shape)
        wide = device == GPU and item == 2 and (precision, model.head_size) != ("bf16", HEAD_SIZE)
        facts = Facts(model, layers, time, norms or emb, emb, wide)
        block = BLOCKS.get(model.version, unknown)(facts)
        if not has_kernels(precision, device):
            block = block._replace(kept=block.kept + PLAIN_KEPT * C, peak=block.peak + PLAIN_WORK * C)
        fixed = sum(layer.fixed for layer in layers.values())
        return cls(model, device, item, bool(train.grad_cp), block, fixed, C * facts.before, C * (1 + head))

    def of_block(self, rows: int, tokens: int) -> int:
        """Bytes that a block keeps: activations, the statistics of its norms, and states of the recurrence."""
        n = rows * tokens
        return self.item * (n * self.block.kept + self.fixed) + 16 * n + self.saved_states(rows, tokens)

    def saved_states(self, rows: int, tokens: int) -> int:
        """Bytes of the states of the recurrence between its segments, which backward starts from. A GPU's kernels of
        wkv6 keep two in the room of one."""
        m = self.model
        is_wkv6, size = m.version == "x060", SINGLE * m.dim_att * m.head_size
        if self.device == CPU:
            return rows * tokens // 64 * size
        count = rows * tokens // (64 if is_wkv6 else 32) + rows
        halved = is_wkv6 and self.item == 2 and m.head_size == HEAD_SIZE
        return (-(-count // 2) if halved else count) * size

    def kept(self, rows: int, tokens: int) -> int:
        """Bytes that the forward pass keeps for the backward pass: with --grad_cp the blocks' inputs."""
        m, each = self.model, self.item * rows * tokens
        if self.grad_cp:
            return each * ((m.n_layer + self.block.carried) * m.n_embd + self.end)
        return m.n_layer * self.of_block(rows, tokens) + each * (self.start + self.end - self.block.first)

    def work(self, rows: int, tokens: int) -> int:
        """Further bytes that the backward pass needs at once, when the last norm has freed its own: with --grad_cp also
        a block's."""
        each, block = self.item * rows * tokens, self.block
        most = max(each * block.peak, each * block.early + self.item * block.work)
        whole = self.of_block(rows, tokens) - each * self.model.n_embd if self.grad_cp else 0
        return max(0, most + whole - each * self.end)

    def states(self, rows: int, tokens: int = 0) -> int:
        """Bytes of the layers' states after rows, with `tokens` tokens in the fields that grow."""
        m = self.model
        state = 2 * m.n_embd * self.item + SINGLE * m.dim_att * m.head_size
        if "length" in m.layer_state._fields:
            state += self.item * (m.attention_size + (1 + tokens) * (m.attention_size + m.n_embd)) + 8
        return rows * m.n_layer * state
