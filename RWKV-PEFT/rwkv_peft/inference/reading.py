"""Read prompts of any lengths, packed in one row: a pass over the weights serves all of them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..models.parts import LanguageModel
from ..models.state import State
from ..ops.decode import product

PREFILL = 4096  # tokens of prompts read in one pass


@torch.inference_mode()
def prefill(
    model: LanguageModel, prompts: Sequence[list[int]], start: State | None = None
) -> tuple[torch.Tensor, State]:
    """Read n prompts (lists of token ids, none empty) -> logits after each (n, V), their State. start is the State of
    one sequence before each prompt, or of all n (None: zeros).

    They are packed into one row, about PREFILL tokens a pass, so that memory does not grow with their lengths. Only the
    last tokens get logits.
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


def read_packed(model: LanguageModel, pieces: Sequence[list[int]], state: State) -> tuple[torch.Tensor, State]:
    """Read a list of tokens for each sequence of state, in one pass -> logits after the last of each (n, V), State."""
    tokens = torch.tensor([token for piece in pieces for token in piece], device=state[0].wkv.device)
    ends = torch.tensor([len(piece) for piece in pieces], device=tokens.device).cumsum(0)
    return model(
        tokens[None], state, cu_seqlens=F.pad(ends, (1, 0)), head=lambda x, weight: product(x[0, ends - 1], weight)
    )
