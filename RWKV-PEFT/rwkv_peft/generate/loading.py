"""What generation starts from: a model with its adapters folded in, and the states that files hold
(models/state.py)."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..data.recorded import find_tokenizer, recorded_beside
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..files.adapters import AdapterSource, source_of
from ..files.base import Base, base_of, open_base, save_model
from ..files.dtypes import DTYPES
from ..files.state_file import read_states
from ..gpus import count_gpus
from ..models import family_named
from ..models.parts import LanguageModel
from ..models.state import State, split_time_states, state_of, state_tensors
from ..release.merge import check_fingerprints, merged_tensors


def load_model(
    path: str | Path,
    adapters: Sequence[AdapterSource] = (),
    precision: str = "fp32",
    device: str = "cpu",
    any_base: bool = False,
) -> tuple[LanguageModel, State | None]:
    """The .pth at path, with adapters (AdapterSources) merged into it in memory -> the model, ready to generate, and
    the State of one sequence that it starts from, or None where neither file holds time states.

    Folding an adapter in gives bit by bit the weights that merge_bone.py would write, so that the tokens are those of
    the merged file and no step pays for the adapter. any_base allows an adapter
    of another base of the same shape. Raises UserError as open_base, AdapterSource.read and merging do.
    """
    base = open_base(path)
    if adapters:
        named = [(source.path, source.read(base.tensors)) for source in adapters]
        if not any_base:
            check_fingerprints(base, named)
        base = base_of(merged_tensors(base, named), path)
    else:
        base.require_finite()  # which merging looks into, too
    weights, states = split_time_states(base.tensors)
    model = base.family.load(weights, base.config)
    model = model.to(device=device, dtype=DTYPES[precision]).requires_grad_(False).eval()
    if device == "cpu" and precision == "fp32":
        store_by_columns(model)
    return model, read_state(states, model, path) if states else None


def resolve_device(args: Namespace) -> str:
    """cpu or cuda: --device, or else cuda if there is one. Raises UserError for a GPU that torch cannot use."""
    if args.device == "cpu":
        return "cpu"
    gpus = count_gpus("run on the CPU with --device cpu")
    if args.device == "cuda" and not gpus:
        raise UserError("--device cuda: this torch sees no CUDA device; leave --device out to run on the CPU")
    return "cuda" if gpus else "cpu"


class Subject(NamedTuple):
    """A model ready to generate, the State of one sequence that it starts from, or None, and its tokenizer."""

    model: LanguageModel
    start: State | None
    tokenizer: Tokenizer


def load_subject(args: Namespace, say: Callable[[str], object]) -> Subject:
    """The Subject that the flags of add_model_flags name. say(text) is told where the tokenizer is another than the one
    recorded. Raises UserError."""
    device = resolve_device(args)
    precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    sources = [source_of(args, path) for path in args.adapter]
    model, start = load_model(args.model, sources, precision, device, args.any_base)
    if args.state:
        start = read_state_file(args.state, model, None if args.any_base else open_base(args.model))
    recorded = recorded_beside(*reversed(args.adapter), args.state, args.model)
    return Subject(model, start, find_tokenizer(args.tokenizer, model.config.vocab_size, recorded, say))


def store_by_columns(model: nn.Module) -> None:
    """Keep the linear layers' weights (out, in) column by column in memory; values and shapes stay.

    One token's product is then a sum of scaled columns, which reads memory faster than many dot products do: a tenth
    more tokens a second on a CPU, where reading the weights is nearly all of the time.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


def read_state_file(path: str | Path, model: LanguageModel, base: Base | None = None) -> State:
    """The State of one sequence in a file of time states of any layout, a run that tuned them, or a saved session.
    Raises UserError where it does not fit the model, is of another generation, or names another base than a Base that
    is given."""
    file = read_states(path)
    file.check_generation(model.config.version)
    if base is not None:
        file.check_base(base)
    return read_state(file.tensors, model, path)


def save_state_file(path: str | Path, state: State, model: LanguageModel) -> None:
    """Write the State of one sequence as a saved session, in float32. Raises UserError where the disk refuses."""
    save_model(path, state_tensors(state, family_named(model.config.version).rows_are_keys))


def read_state(tensors: Mapping[str, torch.Tensor], model: LanguageModel, name: str | Path) -> State:
    """The State of one sequence from the {key: tensor} of a file."""
    zeros = State.zeros(model.config, 1, model.emb.weight.device, model.emb.weight.dtype)
    return state_of(tensors, zeros, family_named(model.config.version).rows_are_keys, name)
