"""The forward passes of inference: prompts of any lengths in one packed row, and decoding steps of a token each.

A decoding step has no Python between its kernels: on a CPU it is a tape of them, on a GPU a CUDA graph of the model's
own forward, and another of the draw with top-p behind it, which penalties and masks of the host may come before. A tape
is recorded for a number of rows when that comes up first. Everything else takes the model's own forward: more rows than
the decoding kernels take, generations without a record, adapters beside the weights. Shapes are (n, …) for n sequences.
No GPU has run the graphs yet: tests/inference/test_forward.py records and replays torch's operations on a CPU instead.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cli.errors import is_gpu_memory, summarize
from ..models.layout import LayerState
from ..models.parts import LanguageModel
from ..models.state import State, grows
from ..ops.decode import CPU, MOST_ROWS, product
from ..ops.decode.tape import Tape
from ..ops.wkv6 import WKV6
from ..ops.wkv7 import WKV7
from .sampling import fill_numbers, sample, select, selects
from .settings import Sampling
from .weights import Arena, FrozenLinear, linears

PREFILL = 4096  # tokens of prompts read in one pass
LARGEST_GRAPH = 256  # rows
WARM_UP = 2  # passes before recording a graph: the first builds kernels, and libraries choose algorithms and allocate
KINDS = (LanguageModel, nn.ModuleList, nn.Embedding, nn.LayerNorm, nn.GroupNorm, FrozenLinear)
Forward = Callable[[Tensor, State], tuple[Tensor, State]]
Draw = Callable[[Tensor, Tensor, Sampling], Tensor]


@torch.inference_mode()
def prefill(model: LanguageModel, prompts: Sequence[list[int]], start: State | None = None) -> tuple[Tensor, State]:
    """n prompts (lists of token ids, none empty) -> logits after each (n, V), and their State.

    start is the State of one sequence before each prompt, or of all n (None: zeros). The prompts are packed into one
    row, about PREFILL tokens a pass, so that memory does not grow with their lengths; only last tokens get logits.
    """
    n, parameter = len(prompts), model.emb.weight
    if start is None:
        start = State.zeros(model.config, 1, parameter.device, parameter.dtype)
    state = start.repeated(n // start[0].wkv.shape[0])
    logits = parameter.new_empty(n, model.config.vocab_size)
    width = max(PREFILL // n, 1)
    for first in range(0, max(map(len, prompts)), width):
        reading = [i for i, prompt in enumerate(prompts) if len(prompt) > first]
        pieces = [prompts[i][first : first + width] for i in reading]
        rows = torch.tensor(reading, device=parameter.device)
        logits[rows], after = read_packed(model, pieces, state.selected(rows))
        state = state.put(rows, after)
    return logits, state


def read_packed(model: LanguageModel, pieces: Sequence[list[int]], state: State) -> tuple[Tensor, State]:
    """A list of tokens for each sequence of state -> logits after the last of each (n, V), and the State, in one
    pass."""
    tokens = torch.tensor([token for piece in pieces for token in piece], device=state[0].wkv.device)
    ends = torch.tensor([len(piece) for piece in pieces], device=tokens.device).cumsum(0)
    return model(
        tokens[None], state, cu_seqlens=F.pad(ends, (1, 0)), head=lambda x, weight: product(x[0, ends - 1], weight)
    )


def forward_of(model: LanguageModel, batch: int) -> Forward:
    """The fastest forward for tokens (n, 1) and a State -> logits (n, 1, V) and the next State, which may reuse the
    memory of the last. A graph is recorded on a GPU, also of weights that train: what they are stored in stays."""
    if recordable(model):
        return GraphedForward(model, batch)
    return model.forward.advance if isinstance(model.forward, TapedForward) else model


def draw_of(model: LanguageModel, vocab_size: int, batch: int) -> Draw:
    """The fastest `sample` of tokens below vocab_size for logits of a model, which may reuse the memory of the last."""
    if recordable(model):
        return GraphedDraw(vocab_size, batch, model.emb.weight.device)
    return sample


def recordable(model: LanguageModel) -> bool:
    """True for a model on a GPU with a step that a graph can repeat."""
    return model.emb.weight.is_cuda and repeats(model)


def repeats(model: LanguageModel) -> bool:
    """True for a model with a State of one size, no Table, which main memory holds, no hooks, which a graph would not
    call, and whole weights: ZeRO's stage 3 gathers its own for each pass."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    parted = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return not (hooked or parted or grows(model.config) or model.tables)


def speed_up(model: LanguageModel) -> None:
    """Use the decoding kernels for a CPU model's matrices, and tapes for its steps, if its generation has a record and
    the kernels can be built."""
    for name, layer in linears(model).items():
        model.set_submodule(name, FrozenLinear(layer.weight))
    layers = (module for block in model.blocks for module in block.modules() if module is not block)
    plain = all(isinstance(module, KINDS) or list(module.children()) for module in layers)
    if plain and model.config.version in RECORDS and CPU.takes(model.emb.weight[:1]):
        model.forward = TapedForward(model)  # type: ignore[method-assign]


class TapedForward:
    """A model's forward with a tape for each number of rows and threads."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.plain = model, model.forward
        self._arena, self._lock = Arena(), Lock()
        self._transposes: dict[int, Tensor] = {}
        self._steps: dict[tuple[int, int], TapedStep] = {}
        self._memory: dict[tuple[str, int], Tensor] = {}

    def __call__(self, tokens: Tensor, state: State | None = None, *others: Any, **named: Any) -> tuple[Any, State]:
        """LanguageModel.forward."""
        return self._step(tokens, state, False, *others, **named)

    def advance(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """tokens (n, 1) and a State -> logits (n, 1, V) and the next State in the same memory: new pages for it would
        take as long as some of the products."""
        return self._step(tokens, state, True)

    def _step(
        self, tokens: Tensor, state: State | None, in_place: bool, *others: Any, **named: Any
    ) -> tuple[Any, State]:
        rows = len(tokens)
        whole = state is not None and not others and not named and rows == state[0].wkv.shape[0]
        if not whole or tokens.shape[1] != 1 or not 0 < rows <= MOST_ROWS or torch.is_grad_enabled():
            return self.plain(tokens, state, *others, **named)
        assert state is not None
        with self._lock:
            kind = rows, torch.get_num_threads()
            if kind not in self._steps:
                with torch.inference_mode(False), torch.no_grad():
                    self._steps[kind] = TapedStep(self.model, rows, self._transpose, self._memory)
            logits, state = self._steps[kind].run(tokens[:, 0], state, in_place)
        return logits[:, None], state

    def _transpose(self, weight: Tensor) -> Tensor:
        """The contiguous transpose of a matrix of the model, computed once."""
        if weight.data_ptr() not in self._transposes:
            self._transposes[weight.data_ptr()] = self._arena.copy(weight.t())
        return self._transposes[weight.data_ptr()]


class TapedStep:
    """A tape of a model's step, with the places of tokens, states and logits in it."""

    def __init__(
        self,
        model: LanguageModel,
        rows: int,
        transpose: Callable[[Tensor], Tensor],
        memory: dict[tuple[str, int], Tensor],
    ) -> None:
        config, self.emb = model.config, model.emb.weight
        self.tape = Tape(rows, self.emb.dtype, memory)
        self.x = self.tape.buffer("x", config.n_embd)
        recorder = Recorder(self.tape, self.x, transpose)
        shifts = self.tape.buffer("shifts", 2 * config.n_layer * config.n_embd)
        self.shifts = shifts.view(config.n_layer, 2, rows, config.n_embd)
        record = RECORDS[config.version]
        self.layers = [record(recorder, block, own) for block, own in zip(model.blocks, self.shifts)]
        x = recorder.norm(model.ln_out, self.tape.buffer("out", config.n_embd))
        logits = self.tape.buffer("logits", config.vocab_size)
        self.logits = self.tape.product_into(x, model.head.weight, logits)
        self.bound: object = None  # `binding` of the TapeState that the tape points to

    def run(self, tokens: Tensor, state: State, in_place: bool) -> tuple[Tensor, State]:
        """tokens (n,) and the State before them -> logits (n, V) and the State after them."""
        torch.index_select(self.emb, 0, tokens, out=self.x)
        if in_place and isinstance(state, TapeState) and state.binding is self.bound:
            after = state
        else:
            state = State(LayerState._make(tensor.contiguous() for tensor in layer) for layer in state)
            after = self.bind(state, in_place)
        logits = self.x.new_empty(len(tokens), self.logits.out_features)
        self.logits.y = logits.data_ptr()
        self.tape.run()
        after.shifts.copy_(self.shifts)
        return logits, after

    def bind(self, state: State, in_place: bool) -> "TapeState":
        """Point the tape to a State and to the next one. If that is in place, the next step finds them bound already:
        binding anew takes as long as some products."""
        shifts = torch.stack([torch.stack([layer.att_shift, layer.ffn_shift]) for layer in state])
        wkv = [layer.wkv if in_place else torch.empty_like(layer.wkv) for layer in state]
        for layer, own, arguments, after in zip(state, shifts, self.layers, wkv):
            for one in arguments.att_shift:
                one.last = own[0].data_ptr()
            arguments.wkv.state, arguments.wkv.final_state = layer.wkv.data_ptr(), after.data_ptr()
            arguments.ffn_shift.last = own[1].data_ptr()
        bound = TapeState(LayerState(own[0], after, own[1]) for own, after in zip(shifts, wkv))
        bound.shifts, bound.binding = shifts, object()
        self.bound = bound.binding if in_place else None
        return bound


class TapeState(State):
    """A State that a tape returned: all shifts in one tensor, and a mark by which the tape recognizes it."""

    shifts: Tensor
    binding: object


class LayerArguments(NamedTuple):
    """The kernels' arguments that hold a layer's state: att_shift and ffn_shift have it as their `last`, wkv as its
    `state`, with the next one as its `final_state`."""

    att_shift: tuple[Any, ...]
    wkv: Any
    ffn_shift: Any


class Recorder:
    """A tape of a model with the residual stream x (n, C) in a buffer.

    transpose(weight) is a matrix's transpose, contiguous. `pending` is added to the stream by the next norm.
    """

    def __init__(self, tape: Tape, x: Tensor, transpose: Callable[[Tensor], Tensor]) -> None:
        self.tape, self.x, self.transpose = tape, x, transpose
        self.pending: Tensor | None = None

    def norm(self, norm: nn.LayerNorm, y: Tensor) -> Tensor:
        self.tape.norm(self.x, norm, y, self.pending)
        self.pending = None
        return y

    def factors(self, x: Tensor, first: Tensor, second: Tensor, kind: str, name: str) -> Tensor:
        """f(x first) second, f being one of the tape's kinds."""
        low = self.tape.product(x, self.transpose(first), "low")
        return self.tape.product(self.tape.element(kind, low) if kind else low, self.transpose(second), name)


def record_rwkv6(recorder: Recorder, block: Any, shifts: Tensor) -> LayerArguments:
    tape, att, ffn = recorder.tape, block.att, block.ffn
    if block.first:
        recorder.norm(block.ln0, recorder.x)
    x = recorder.norm(block.ln1, shifts[0])
    (point,), first = tape.lerp(x, att.time_maa_x.flatten(0, 1), ["point"])
    low = tape.element("tanh", tape.product(point, recorder.transpose(att.time_maa_w1), "low"))
    (xw, xk, xv, xr, xg), second = tape.lerp(x, att.maa(), ["xw", "xk", "xv", "xr", "xg"], low, att.time_maa_w2)
    k, v = tape.product(xk, att.key.weight, "k"), tape.product(xv, att.value.weight, "v")
    r, g = tape.product(xr, att.receptance.weight, "r"), tape.product(xg, att.gate.weight, "g")
    w = recorder.factors(xw, att.time_decay_w1, att.time_decay_w2, "tanh", "w")
    tape.element("", w, att.time_decay.flatten())
    y, wkv = tape.recur(WKV6.cpu, (r, k, v, w, att.time_faaaa.float()), att.head_size)
    norm, out = att.ln_x, tape.buffer("gated", y.shape[1])
    tensors = dict(y=y, g=g, weight=norm.weight, bias=norm.bias, out=out)
    tape.mix("norm_gate", tensors, eps=norm.eps, channels=y.shape[1], size=att.head_size)
    recorder.pending = tape.product(out, att.output.weight, "mixed")
    x = recorder.norm(block.ln2, shifts[1])
    (xk, xr), third = tape.lerp(x, ffn.maa(), ["xk", "xr"])
    key = tape.product(xk, ffn.key.weight, "key")
    tape.mix("relu_square", dict(x=key, out=key), channels=key.shape[1])
    y, r = tape.product(key, ffn.value.weight, "value"), tape.product(xr, ffn.receptance.weight, "r")
    recorder.pending = tape.buffer("mixed", x.shape[1])
    tape.mix("sigmoid_gate", dict(r=r, v=y, out=recorder.pending), channels=x.shape[1])
    return LayerArguments((first, second), wkv, third)


def record_rwkv7(recorder: Recorder, block: Any, shifts: Tensor) -> LayerArguments:
    tape, att, ffn = recorder.tape, block.att, block.ffn
    if block.first:
        recorder.norm(block.ln0, recorder.x)
    x = recorder.norm(block.ln1, shifts[0])
    sizes = dict(channels=x.shape[1], size=att.head_size)
    (xr, xw, xk, xv, xa, xg), first = tape.lerp(x, att.amounts(), ["xr", "xw", "xk", "xv", "xa", "xg"])
    r, k = tape.product(xr, att.receptance.weight, "r"), tape.product(xk, att.key.weight, "k")
    v = v_first = tape.product(xv, att.value.weight, "v_first" if block.first else "v")
    w = tape.element("", recorder.factors(xw, att.w1, att.w2, "tanh", "w"), att.w0.flatten())
    if not block.first:
        low, v_first = recorder.factors(xv, att.v1, att.v2, "", "low"), tape.buffer("v_first", x.shape[1])
        v = tape.buffer("value_mixed", x.shape[1])
        tensors = dict(v=tape.buffer("v", x.shape[1]), first=v_first, low=low, v0=att.v0, out=v)
        tape.mix("value_residual", tensors, channels=x.shape[1])
    g = recorder.factors(xg, att.g1, att.g2, "sigmoid", "g")
    rate = recorder.factors(xa, att.a1, att.a2, "", "a")
    key, removed, written = (tape.buffer(name, x.shape[1]) for name in ("keys", "removed", "written"))
    tensors = dict(k=k, low=rate, a0=att.a0, k_k=att.k_k, k_a=att.k_a, key=key, a=removed, b=written)
    tape.mix("delta_keys", tensors, **sizes)
    y, wkv = tape.recur(WKV7.cpu, (r, w, key, v, removed, written), att.head_size)
    norm, out = att.ln_x, tape.buffer("gated", x.shape[1])
    tensors = dict(y=y, r=r, k=key, v=v, g=g, r_k=att.r_k, weight=norm.weight, bias=norm.bias, out=out)
    tape.mix("norm_bonus_gate", tensors, eps=norm.eps, **sizes)
    recorder.pending = tape.product(out, att.output.weight, "mixed")
    x = recorder.norm(block.ln2, shifts[1])
    (xk,), second = tape.lerp(x, ffn.x_k.flatten(0, 1), ["xk"])
    key = tape.product(xk, ffn.key.weight, "key")
    tape.mix("relu_square", dict(x=key, out=key), channels=key.shape[1])
    recorder.pending = tape.product(key, ffn.value.weight, "mixed")
    return LayerArguments((first,), wkv, second)


RECORDS: MappingProxyType[str, Callable[[Recorder, Any, Tensor], LayerArguments]] = MappingProxyType(
    {"x060": record_rwkv6, "x070": record_rwkv7}
)


class GraphedForward:
    """A model's step for at most `batch` rows, with a CUDA graph for each padded number of them: 1, 2, 4, …

    Results lie in memory that the next call overwrites: a State that comes back in that call is in place already, and
    one that is to last longer must be copied. If the driver cannot record the model, the step runs without graphs.
    """

    def __init__(self, model: LanguageModel, batch: int) -> None:
        self.model, self.most, weight = model, min(padded(batch), LARGEST_GRAPH), model.emb.weight
        self.tokens = torch.zeros(self.most, 1, dtype=torch.long, device=weight.device)
        self.state = State.zeros(model.config, self.most, weight.device, weight.dtype)
        self.latest: State | None = None
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, tuple[Any, Tensor]] = {}  # with the logits, by numbers of rows

    def __call__(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        n, size = len(tokens), padded(len(tokens))
        if size <= self.most and size not in self.graphs:
            self.record(size)
        if size > self.most:
            return self.model(tokens, state)
        graph, logits = self.graphs[size]
        if state is not self.latest:
            copy_state(state, self.state.first(n))
            self.latest = self.state.first(n)
        self.tokens[:n].copy_(tokens)
        graph.replay()
        return logits[:n], self.latest

    def record(self, size: int) -> None:
        """Record the step of `size` rows."""
        recorded = record_graph(partial(self.compute, size), self.pool, "what the model does")
        if recorded is None:
            self.most = 0
        else:
            self.graphs[size] = recorded

    def compute(self, size: int) -> Tensor:
        logits, after = self.model(self.tokens[:size], self.state.first(size))
        copy_state(after, self.state.first(size))
        return logits


class GraphedDraw:
    """`sample` for at most `batch` rows of logits (n, V), with a CUDA graph of `select` for each padded number of them.

    One graph serves every temperature and top-p, which it reads from memory. Tokens lie in memory that the next call
    overwrites. Other samplings, which sort nothing long, are launched as they are.
    """

    def __init__(self, vocab_size: int, batch: int, device: torch.device) -> None:
        self.most = min(padded(batch), LARGEST_GRAPH)
        self.logits = torch.zeros(self.most, vocab_size, device=device)
        self.uniforms = torch.zeros(self.most, dtype=torch.float64, device=device)
        self.numbers = torch.ones(3, dtype=torch.float64, device=device)
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple[int, int], tuple[Any, Tensor]] = {}  # with the tokens, by rows and numbers read

    def __call__(self, logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
        n, size = len(logits), padded(len(logits))
        if not selects(sampling) or size > self.most:
            return sample(logits, uniforms, sampling)
        numbers = fill_numbers(self.numbers, sampling)
        if (size, len(numbers)) not in self.graphs:
            compute = partial(select, self.logits[:size], self.uniforms[:size], numbers)
            recorded = record_graph(compute, self.pool, "how tokens are drawn")
            if recorded is None:
                self.most = 0
                return sample(logits, uniforms, sampling)
            self.graphs[size, len(numbers)] = recorded
        graph, tokens = self.graphs[size, len(numbers)]
        self.logits[:n].copy_(logits)
        self.uniforms[:n].copy_(uniforms)
        graph.replay()
        return tokens[:n]


def record_graph(compute: Callable[[], Tensor], pool: Any, what: str) -> tuple[Any, Tensor] | None:
    """Record a function in a CUDA graph -> the graph and its result; None if the driver cannot record `what` it does,
    which is printed."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # as recording does
        for _ in range(WARM_UP):
            compute()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = compute()
    except RuntimeError as error:
        if is_gpu_memory(error):
            raise
        remedy = "tokens are drawn without CUDA graphs, and more slowly"
        print(f"this GPU's driver cannot record {what} ({summarize(error)}); {remedy}", file=sys.stderr)
        return None
    return graph, result


def padded(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def copy_state(state: State, to: State) -> None:
    """Overwrite a State, in one launch for each of its fields."""
    for new, old in zip(zip(*state), zip(*to)):
        torch._foreach_copy_([*old], [*new])
