"""Batched recurrent decoding: prompts of any lengths are read packed, then all sequences advance together.

A sequence costs one State, whatever its length. When one ends, it leaves the batch and a waiting prompt takes its
place.
"""

import random
from collections import abc, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..files.dtypes import dtype_name
from ..models.parts import LanguageModel
from ..models.state import State
from ..ops.decode import product
from .sampling import count, measure, penalize, sample
from .settings import Sampling

PREFILL = 4096  # tokens of prompts read in one pass


class Step(NamedTuple):
    """A token drawn for the prompt of this number; end is "" while its sequence goes on, else the reason why it ends
    with this token: "length", or the one that `ends` gave. If the sampling is `measured`, the token's log-probability
    and the entropy of the distribution, in nats, at the sampling's temperature and before top-k and top-p."""

    number: int
    token: int
    end: str
    logprob: float = 0.0
    entropy: float = 0.0


@dataclass
class Sequence:
    """A row of the batch: its prompt's number, its own random numbers, and the count of tokens it has generated."""

    number: int
    random: random.Random
    length: int = 0


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: abc.Sequence[list[int]] | abc.Mapping[int, list[int]],
    sampling: Sampling = Sampling(),
    max_tokens: int = 256,
    ends: Callable[[int, int], str] | None = None,
    start: State | None = None,
    batch: int = 32,
    vocab_size: int | None = None,
) -> Iterator[Step]:
    """Continue prompts (lists of token ids, none empty), numbered by their place, or {number: prompt}; yield a Step for
    each token as it is drawn. A prompt that is the same list as the one before it is read once for both.

    ends(number, token) -> "" or a reason to end that sequence there; start is the State of one sequence before each
    prompt (None: zeros); at most `batch` sequences advance at a time; tokens from vocab_size on are never drawn.
    The tokens of a prompt depend only on it, its number, `start` and `sampling`, up to rounding, not on the other
    prompts. Raises UserError for an empty prompt, and if the model's logits are not finite.
    """
    numbered = list(prompts.items() if isinstance(prompts, abc.Mapping) else enumerate(prompts))
    for number, prompt in numbered:
        if not prompt:
            raise UserError(f"prompt {number} holds no token; a model continues at least one")
    waiting = deque(numbered if max_tokens > 0 else ())
    opening = Opening(model, start)
    config, device = model.config, model.emb.weight.device
    vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
    rows: list[Sequence] = []
    logits, state = torch.empty(0, config.vocab_size, device=device), None
    counts = torch.empty(0, vocab_size, device=device)
    while waiting or rows:
        if waiting and len(rows) < batch:
            fresh = [waiting.popleft() for _ in range(min(batch - len(rows), len(waiting)))]
            read, memory = opening([prompt for _, prompt in fresh])
            rows += [Sequence(number, random.Random(sampling.seed + number)) for number, _ in fresh]
            logits, state = torch.cat([logits, read.float()]), memory if state is None else state.joined(memory)
            if sampling.penalizes:
                counts = torch.cat([counts, counts.new_zeros(len(fresh), vocab_size)])
        assert state is not None  # because there is a row
        check_finite(logits, rows, model)
        choices = logits[:, :vocab_size]
        if sampling.penalizes:
            choices = penalize(choices, counts, sampling)
        tokens = sample(choices, [row.random.random() for row in rows], sampling)  # (n,)
        if sampling.penalizes:
            count(counts, tokens, sampling.penalty_decay)
        measures = measure(choices, tokens, sampling) if sampling.measured else [(0.0, 0.0)] * len(rows)
        staying = []
        for position, (row, token) in enumerate(zip(rows, tokens.tolist())):
            row.length += 1
            end = (ends(row.number, token) if ends else "") or ("length" if row.length == max_tokens else "")
            if not end:
                staying.append(position)
            yield Step(row.number, token, end, *measures[position])
        if len(staying) < len(rows):
            rows = [rows[position] for position in staying]
            kept = torch.tensor(staying, dtype=torch.long, device=device)
            tokens, state = tokens[kept], state.selected(kept)
            counts = counts[kept] if sampling.penalizes else counts
        if rows:
            logits, state = model(tokens[:, None], state)
            logits = logits[:, 0].float()
        else:
            logits, state = logits[:0], None


class Opening:
    """Reads prompts, each run of the same list once, and keeps what it read last, because that prompt may go on."""

    def __init__(self, model: LanguageModel, start: State | None) -> None:
        self.model, self.start = model, start
        self.last: list[int] = []
        self.read: tuple[torch.Tensor, State] | None = None

    def __call__(self, prompts: abc.Sequence[list[int]]) -> tuple[torch.Tensor, State]:
        """prefill of n prompts."""
        news = [prompt for before, prompt in pairwise([self.last, *prompts]) if prompt is not before]
        found = self.read if prompts[0] is self.last else None
        if news:
            logits, state = prefill(self.model, news, self.start)
            found = (logits, state) if found is None else (torch.cat([found[0], logits]), found[1].joined(state))
        assert found is not None  # because there is a prompt
        turns = accumulate(int(prompt is not before) for before, prompt in pairwise([prompts[0], *prompts]))
        owners = torch.tensor(list(turns), device=found[0].device)
        self.last, self.read = prompts[-1], (found[0][-1:], found[1].selected(owners[-1:]))
        return found[0][owners], found[1].selected(owners)


@torch.inference_mode()
def prefill(
    model: LanguageModel, prompts: abc.Sequence[list[int]], start: State | None = None
) -> tuple[torch.Tensor, State]:
    """Read n prompts (lists of token ids, none empty), each from start, the State of one sequence (None: zeros) ->
    logits after each (n, V), their State.

    They are packed into one row, about PREFILL tokens a pass, so that memory does not grow with their lengths. Only the
    last tokens get logits.
    """
    n, parameter = len(prompts), model.emb.weight
    if start is None:
        start = State.zeros(model.config, 1, parameter.device, parameter.dtype)
    state = start.repeated(n)
    logits = parameter.new_empty(n, model.config.vocab_size)
    width = max(PREFILL // n, 1)
    for first in range(0, max(map(len, prompts)), width):
        reading = [i for i, prompt in enumerate(prompts) if len(prompt) > first]
        pieces = [prompts[i][first : first + width] for i in reading]
        rows = torch.tensor(reading, device=parameter.device)
        logits[rows], after = read_packed(model, pieces, state.selected(rows))
        state.put(rows, after)
    return logits, state


def read_packed(model: LanguageModel, pieces: abc.Sequence[list[int]], state: State) -> tuple[torch.Tensor, State]:
    """Read a list of tokens for each sequence of state, in one pass -> logits after the last of each (n, V), State."""
    tokens = torch.tensor([token for piece in pieces for token in piece], device=state[0].wkv.device)
    ends = torch.tensor([len(piece) for piece in pieces], device=tokens.device).cumsum(0)
    return model(
        tokens[None], state, cu_seqlens=F.pad(ends, (1, 0)), head=lambda x, weight: product(x[0, ends - 1], weight)
    )


def check_finite(logits: torch.Tensor, rows: abc.Sequence[Sequence], model: LanguageModel) -> None:
    """Raise UserError if a sequence's logits hold NaN or Inf."""
    finite = torch.isfinite(logits.sum(-1))  # a sum with NaN or Inf in it is not finite
    if not finite.all():
        row = rows[int(finite.logical_not().nonzero()[0])]
        raise UserError(
            f"the model's logits are NaN or Inf for prompt {row.number} after {row.length} tokens: its weights "
            f"are damaged, or too large for {dtype_name(model.emb.weight.dtype)} (try --precision fp32)"
        )
