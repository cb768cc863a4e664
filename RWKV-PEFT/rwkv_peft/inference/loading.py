"""Load the model, with its adapters merged in, and the state that generation starts from; save such states."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoints.adapters import AdapterSource, sources_of
from ..checkpoints.base import Base, base_of, open_base, save_model
from ..checkpoints.state_file import read_states
from ..checkpoints.tensors import DTYPES
from ..cli.errors import UserError
from ..data.recorded import find_tokenizer, recorded_beside
from ..data.tokenizer import Tokenizer
from ..gpus import count_gpus
from ..models import family_named
from ..models.parts import LanguageModel
from ..models.state import State, split_time_states, state_of, state_tensors
from ..release.merge import MergeOptions, check_fingerprints, merged_tensors
from .forward import speed_up
from .weights import place, quantize_products


def load_model(
    path: str | Path,
    adapters: Sequence[AdapterSource] = (),
    precision: str = "fp32",
    device: str = "cpu",
    any_base: bool = False,
    weights: str | None = None,
    log: Callable[[str], object] = lambda text: None,
) -> tuple[LanguageModel, State | None]:
    """Load the .pth at path, with adapters merged into it in memory -> the model, ready to generate, and the State that
    a sequence starts from, or None.

    Merging gives bitwise the weights of merge_bone.py, so the tokens are the merged file's, and no step pays for the
    adapter. any_base allows an adapter of another base of the same shape. weights "int8" or "int4" rounds the
    matrices to blocks of so many bits, and logs their sizes. Raises UserError for files that cannot be read, merged or
    rounded, and for weights that are not finite.
    """

    def prepare(plain: LanguageModel) -> None:
        plain.settle()
        if weights:
            quantize_products(plain, weights, log)

    model, start = model_of(merged_base(path, adapters, any_base), precision, device, prepare)
    if device == "cpu":
        place(model)
        speed_up(model)
    return model, start


def merged_base(
    path: str | Path, adapters: Sequence[AdapterSource] = (), any_base: bool = False, dtype: torch.dtype | None = None
) -> Base:
    """The Base in the .pth at path, with adapters merged into it in memory, in a dtype (None: the file's), and all
    weights finite. Other arguments and errors are as for load_model."""
    base = open_base(path)
    if not adapters:
        base.require_finite()  # merging checks it by itself
        return base
    named = [(source.path, source.read(base.tensors)) for source in adapters]
    if not any_base:
        check_fingerprints(base, named)
    return base_of(merged_tensors(base, named, MergeOptions(dtype)), path)


def model_of(
    base: Base, precision: str, device: str, prepare: Callable[[LanguageModel], object] = lambda model: None
) -> tuple[LanguageModel, State | None]:
    """The frozen model of a Base, and the State of one sequence from its time states, if it has any. prepare(model) is
    called before the weights are cast and moved."""
    weights, states = split_time_states(base.tensors)
    model = base.family.load(weights, base.config).requires_grad_(False).eval()
    prepare(model)
    model = model.to(device=device, dtype=DTYPES[precision])
    return model, read_state(states, model, base.path) if states else None


def resolve_device(device: str | None) -> str:
    """The --device, or else "cuda" if there is a GPU, "cpu" if not. Raises UserError for a GPU that torch cannot
    use."""
    if device == "cpu":
        return "cpu"
    gpus = count_gpus("run on the CPU with --device cpu")
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: this torch sees no CUDA device; leave --device out to run on the CPU")
    return "cuda" if gpus else "cpu"


class Subject(NamedTuple):
    """A model ready to generate, the State of one sequence that it starts from (None: zeros), and its tokenizer."""

    model: LanguageModel
    start: State | None
    tokenizer: Tokenizer


def load_subject(args: Namespace, log: Callable[[str], object]) -> Subject:
    """Load the Subject that the flags of add_model_flags name. log(text) gets notes on rounded weights, and on a
    tokenizer that differs from the recorded one. Raises UserError for files that cannot be read or do not fit."""
    device = resolve_device(args.device)
    precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    sources = sources_of(args, args.adapter)
    model, start = load_model(args.model, sources, precision, device, args.any_base, args.weights, log)
    if args.state:
        start = read_state_file(args.state, model, None if args.any_base else open_base(args.model))
    recorded = recorded_beside(*reversed(args.adapter), args.state, args.model)
    return Subject(model, start, find_tokenizer(args.tokenizer, model.config.vocab_size, recorded, log))


def read_state_file(path: str | Path, model: LanguageModel, base: Base | None = None) -> State:
    """The State of one sequence in a file of time states in any layout, the folder of a run that tuned them, or a saved
    session. Raises UserError if it does not fit the model, or names another base than `base` (None: any)."""
    file = read_states(path)
    file.check_generation(model.config.version)
    if base is not None:
        file.check_base(base)
    return read_state(file.tensors, model, path)


def save_state_file(path: str | Path, state: State, model: LanguageModel) -> None:
    """Write the State of one sequence as a saved session, in float32. Raises UserError if it cannot be written."""
    save_model(path, state_tensors(state, family_named(model.config.version).rows_are_keys))


def read_state(tensors: Mapping[str, torch.Tensor], model: LanguageModel, name: str | Path) -> State:
    """The State of one sequence from the {key: tensor} of a file called `name`. Raises UserError if it does not fit the
    model."""
    zeros = State.zeros(model.config, 1, model.emb.weight.device, model.emb.weight.dtype)
    return state_of(tensors, zeros, family_named(model.config.version).rows_are_keys, name)
