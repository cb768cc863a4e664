"""Reads the rows of a run once with its teacher, and stores what it says of them: --store_teacher."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.atomic import atomic_write, check_output
from ..cli.errors import UserError
from ..cli.parser import counted
from ..config import RunConfig
from ..data.batches import EvalBatches
from ..data.samples import Samples
from ..gpus import resolve_accelerator
from ..models.parts import LanguageModel
from ..objectives.distill import Distill
from ..objectives.divergence import Stored, most_probable, taught_rows
from ..ops.products import linear
from .flags.request import Request
from .inputs import find_samples
from .model import own_device
from .step.contexts import Contexts, seen_by_teacher
from .step.steps import Whole
from .step.stored import Source, documents_of, write_stored
from .step.teacher import make_teacher, require_own_tokens

TOLD = 100  # batches after which progress is told


def store(request: Request, say: Callable[..., object]) -> int:
    """Store the teacher's word on the rows that the run of a Request would read. Returns the exit code."""
    config, objective = request.config, request.config.objective
    base = request.teacher or request.base
    assert isinstance(objective, Distill) and base is not None  # because others store nothing, and rules ask for one
    rows = ("--data_file", config.data.path)
    check_output("--store_teacher", objective.store, [("--teacher_model", objective.teacher), rows])
    if Path(objective.store).suffix != ".safetensors":
        raise UserError(f"--store_teacher {objective.store}: a name that ends in .safetensors is due")
    base.require_finite()
    samples, measured = find_samples(config)
    require_own_tokens(base, samples.vocabulary)
    device = own_device(resolve_accelerator(config.train), 0)
    model = make_teacher(base, config, device).model
    said: dict[bytes, Stored] = {}
    for number, (key, word) in enumerate(words_on([samples, *measured.values()], model, config, objective), 1):
        said.setdefault(key, word)
        if number % TOLD == 0:
            say(f"{counted(number, 'document')} read", flush=True)
    left = torch.cat([word.logprobs[:, -1] for word in said.values()]).exp()
    tokenizer = samples.vocabulary.hash if samples.vocabulary else ""
    sizes = (config.model.vocab_size, objective.temperature, left.mean().item())
    with atomic_write(objective.store) as temporary:
        write_stored(temporary, said, Source(Path(base.path).name, base.fingerprint, tokenizer, *sizes))
    kept = next(iter(said.values())).words.shape[1]
    say(
        f"wrote {objective.store}: {kept} tokens at each of {counted(len(left), 'place')} of "
        f"{counted(len(said), 'document')}, {Path(objective.store).stat().st_size:,} bytes; of the probability "
        f"{left.mean():.2%} is left, at most {left.max():.2%} at a place"
    )
    return 0


@torch.inference_mode()
def words_on(
    found: Iterable[Samples], model: LanguageModel, config: RunConfig, objective: Distill
) -> Iterator[tuple[bytes, Stored]]:
    """Yield the key of each document of samples, as documents_of makes it, and what a teacher says there."""
    device, contexts = next(model.parameters()).device, Contexts()
    through: Any = contexts.through  # whose head here gives no tensor
    number = min(objective.top_k, config.model.vocab_size - 1)
    step = Whole(contexts=contexts if config.data.of_contexts else None)
    parts = (part for samples in found for part in samples.parts)
    for batch in (batch for part in parts for batch in EvalBatches(part, config.data.micro_bsz)):
        seen = dict(seen_by_teacher(batch | step.sent(batch, device)))
        seen |= {name: tensor.to(device) for name, tensor in seen.items() if torch.is_tensor(tensor)}

        def head(x: torch.Tensor, weight: torch.Tensor, counted: torch.Tensor = seen["counted"]) -> Stored:
            parts = x.reshape(-1, x.shape[-1])[counted].split(taught_rows(len(weight), weight.is_cuda))
            said = [most_probable(linear(part, weight), number, objective.temperature) for part in parts]
            return Stored(*map(torch.cat, zip(*said)))

        word = through(model, seen, head)
        word = Stored(word.words.int().cpu(), word.logprobs.float().cpu())
        for key, place in documents_of(batch):
            yield key, word.part(place)
