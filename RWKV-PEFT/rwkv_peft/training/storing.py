"""--store_teacher: read the rows of a run once with its teacher, and store its most probable tokens there."""

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
from .step.shared_prefix import Contexts, teacher_batch
from .step.steps import Whole
from .step.teacher import Source, documents_of, make_teacher, require_own_tokens, write_stored

EVERY = 100  # documents after which progress is printed


def store(request: Request, say: Callable[..., object]) -> int:
    """Store the teacher's log-probabilities on the rows that the run of a Request would read -> the exit code."""
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
    model = make_teacher(base, config, own_device(resolve_accelerator(config.train), 0))
    stored: dict[bytes, Stored] = {}
    for number, (key, found) in enumerate(stored_of([samples, *measured.values()], model, config, objective), 1):
        stored.setdefault(key, found)
        if number % EVERY == 0:
            say(f"{counted(number, 'document')} read", flush=True)
    left = torch.cat([found.logprobs[:, -1] for found in stored.values()]).exp()
    tokenizer = samples.vocabulary.hash if samples.vocabulary else ""
    sizes = (config.model.vocab_size, objective.temperature, left.mean().item())
    with atomic_write(objective.store) as temporary:
        write_stored(temporary, stored, Source(Path(base.path).name, base.fingerprint, tokenizer, *sizes))
    kept = next(iter(stored.values())).words.shape[1]
    say(
        f"wrote {objective.store}: {kept} tokens at each of {counted(len(left), 'place')} of "
        f"{counted(len(stored), 'document')}, {Path(objective.store).stat().st_size:,} bytes; of the probability "
        f"{left.mean():.2%} is left, at most {left.max():.2%} at a place"
    )
    return 0


@torch.inference_mode()
def stored_of(
    found: Iterable[Samples], model: LanguageModel, config: RunConfig, objective: Distill
) -> Iterator[tuple[bytes, Stored]]:
    """Yield the key of each document of samples, as documents_of makes it, and the teacher's Stored of it."""
    contexts = Contexts()
    teacher_forward: Any = contexts.forward  # whose head here gives no tensor
    number = min(objective.top_k, config.model.vocab_size - 1)
    step = Whole(contexts=contexts if config.data.of_contexts else None)
    parts = (part for samples in found for part in samples.parts)
    for batch in (batch for part in parts for batch in EvalBatches(part, config.data.micro_bsz)):
        seen = teacher_batch(step.prepare_inputs(batch, next(model.parameters()).device))

        def head(x: torch.Tensor, weight: torch.Tensor, counted: torch.Tensor = seen["counted"]) -> Stored:
            parts = x.reshape(-1, x.shape[-1])[counted].split(taught_rows(len(weight), weight.is_cuda))
            chunks = [most_probable(linear(part, weight), number, objective.temperature) for part in parts]
            return Stored(*map(torch.cat, zip(*chunks)))

        stored = teacher_forward(model, seen, head)
        stored = Stored(stored.words.int().cpu(), stored.logprobs.float().cpu())
        for key, place in documents_of(batch):
            yield key, stored.part(place)
