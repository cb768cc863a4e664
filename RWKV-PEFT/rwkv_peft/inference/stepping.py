"""One token of each sequence by one call: a model's step on a CPU as a tape of kernels (recorded.py).

A tape is for a number of rows, and is recorded when that comes up first. What a step does not cover takes the model's
own forward: prompts, more rows than the kernels of decoding take, generations without a record, adapters beside the
weights.
"""

from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ..models.parts import LanguageModel
from ..models.state import LayerState, State
from ..ops.decode import MOST_ROWS, Tape
from ..ops.decode.cpu import FAMILY
from .recorded import RECORDS, Recorder
from .weights import Arena, Product

KINDS = (LanguageModel, nn.ModuleList, nn.Embedding, nn.LayerNorm, nn.GroupNorm, Product)


class Tapes:
    """A model's forward, and its tapes of a token for each of some rows."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.plain = model, model.forward
        self._arena, self._lock = Arena(), Lock()
        self._turned: dict[int, Tensor] = {}
        self._tapes: dict[tuple[int, int], Recorded] = {}
        self._memory: dict[tuple[str, int], Tensor] = {}

    def __call__(self, tokens: Tensor, state: State | None = None, *others: Any, **named: Any) -> tuple[Any, State]:
        """LanguageModel.forward."""
        return self._step(tokens, state, False, *others, **named)

    def advance(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read tokens (n, 1) from a State -> logits (n, 1, V), and the State after them, which takes its memory: new
        pages for it would take as long as some of the products."""
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
            if kind not in self._tapes:
                with torch.inference_mode(False), torch.no_grad():
                    self._tapes[kind] = Recorded(self.model, rows, self._turn, self._memory)
            logits, state = self._tapes[kind].run(tokens[:, 0], state, in_place)
        return logits[:, None], state

    def _turn(self, weight: Tensor) -> Tensor:
        """The transpose of a matrix (in, out) of the model, made once."""
        if weight.data_ptr() not in self._turned:
            self._turned[weight.data_ptr()] = self._arena.keep(weight.t())
        return self._turned[weight.data_ptr()]


class Recorded:
    """A tape of a model's step, and where tokens, states and logits go in it."""

    def __init__(self, model: LanguageModel, rows: int, turned: Any, memory: dict[tuple[str, int], Tensor]) -> None:
        config, self.emb = model.config, model.emb.weight
        self.tape = Tape(rows, self.emb.dtype, memory)
        self.x = self.tape.buffer("x", config.n_embd)
        recorder = Recorder(self.tape, self.x, turned)
        shifts = self.tape.buffer("shifts", 2 * config.n_layer * config.n_embd)
        self.shifts = shifts.view(config.n_layer, 2, rows, config.n_embd)
        record = RECORDS[config.version]
        self.layers = [record(recorder, block, own) for block, own in zip(model.blocks, self.shifts)]
        x = recorder.norm(model.ln_out, self.tape.buffer("out", config.n_embd))
        logits = self.tape.buffer("logits", config.vocab_size)
        self.logits = self.tape.product_into(x, model.head.weight, logits)
        self.bound: object = None  # `to` of the State that the tape points to

    def run(self, tokens: Tensor, state: State, in_place: bool) -> tuple[Tensor, State]:
        """tokens (n,) and the State before them -> logits (n, V), the State after them, `in_place` or not."""
        torch.index_select(self.emb, 0, tokens, out=self.x)
        if in_place and isinstance(state, Bound) and state.to is self.bound:
            after = state
        else:
            state = State(LayerState._make(tensor.contiguous() for tensor in layer) for layer in state)
            after = self.bind(state, in_place)
        logits = self.x.new_empty(len(tokens), self.logits.out_features)
        self.logits.y = logits.data_ptr()
        self.tape.run()
        after.shifts.copy_(self.shifts)
        return logits, after

    def bind(self, state: State, in_place: bool) -> "Bound":
        """Point the tape to a State, and to that after it. If it is in place, the next step finds them so: to point
        anew takes as long as some products."""
        shifts = torch.stack([torch.stack([layer.att_shift, layer.ffn_shift]) for layer in state])
        wkv = [layer.wkv if in_place else torch.empty_like(layer.wkv) for layer in state]
        for layer, own, arguments, after in zip(state, shifts, self.layers, wkv):
            for one in arguments.att_shift:
                one.last = own[0].data_ptr()
            arguments.wkv.state, arguments.wkv.final_state = layer.wkv.data_ptr(), after.data_ptr()
            arguments.ffn_shift.last = own[1].data_ptr()
        bound = Bound(LayerState(own[0], after, own[1]) for own, after in zip(shifts, wkv))
        bound.shifts, bound.to = shifts, object()
        self.bound = bound.to if in_place else None
        return bound


class Bound(State):
    """A State that tapes made: its shifts in one tensor, and the name by which the tape knows it that points to it."""

    shifts: Tensor
    to: object


def step_by_tape(model: LanguageModel) -> None:
    """Let a model whose linear layers are Products take its steps by tapes, if its generation has a record, and its
    kernels can be built."""
    layers = (module for block in model.blocks for module in block.modules() if module is not block)
    plain = all(isinstance(module, KINDS) or list(module.children()) for module in layers)
    if plain and model.config.version in RECORDS and FAMILY.takes(model.emb.weight[:1]):
        model.forward = Tapes(model)  # type: ignore[method-assign]
