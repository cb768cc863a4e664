"""Load the model, with its adapters merged in, and the state that generation starts from; save such states."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoints.adapters import AdapterSource, source_of
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
from ..release.merge import check_fingerprints, merged_tensors
from .stepping import step_by_tape
from .weights import decoding, place, quantize_products


def load_model(
    path: str | Path,
    adapters: Sequence[AdapterSource] = (),
    precision: str = "fp32",
    device: str = "cpu",
    any_base: bool = False,
    weights: str | None = None,
    say: Callable[[str], object] = lambda text: None,
    keep: bool = False,
) -> tuple[LanguageModel, State | None]:
    """Load the .pth at path, with adapters (AdapterSources) merged into it in memory -> the model, ready to generate,
    and the State of one sequence that it starts from, or None if no file holds time states.

    The merged weights are bit by bit those that merge_bone.py would write, so the tokens are those of the merged file,
    and no step pays for the adapter. any_base allows an adapter of another base of the same shape. weights "int8" or
    "int4" rounds the matrices to blocks of so many bits, and tells `say`; with `keep` the blocks are kept beside the
    model's file. Raises UserError as open_base, AdapterSource.read and merging do, for weights that are not finite, and
    for ones that cannot be rounded or kept.
    """

    if keep and (adapters or not weights):
        raise UserError(
            "--keep_weights keeps the rounded matrices of a model by itself; give --weights int8 or int4, and no "
            "--adapter (merge it)"
        )

    def prepare(plain: LanguageModel) -> None:
        plain.settle()
        if weights:
            quantize_products(plain, weights, say, path if keep else None)

    model, start = model_of(merged_base(path, adapters, any_base), precision, device, prepare)
    if device == "cpu":
        place(model)
        decoding(model)
        step_by_tape(model)
    return model, start


def merged_base(path: str | Path, adapters: Sequence[AdapterSource] = (), any_base: bool = False) -> Base:
    """Open the .pth at path as a Base whose weights are finite, with adapters merged into it in memory. Arguments and
    errors are those of load_model."""
    base = open_base(path)
    if not adapters:
        base.require_finite()  # merging checks it by itself
        return base
    named = [(source.path, source.read(base.tensors)) for source in adapters]
    if not any_base:
        check_fingerprints(base, named)
    return base_of(merged_tensors(base, named), path)


def model_of(
    base: Base, precision: str, device: str, prepare: Callable[[LanguageModel], object] = lambda model: None
) -> tuple[LanguageModel, State | None]:
    """Make the model of a Base, frozen, and the State of one sequence that its time states give (None: it has none).
    prepare(model) is called while its weights are still those of the Base."""
    weights, states = split_time_states(base.tensors)
    model = base.family.load(weights, base.config).requires_grad_(False).eval()
    prepare(model)
    model = model.to(device=device, dtype=DTYPES[precision])
    return model, read_state(states, model, base.path) if states else None


def resolve_device(asked: str | None) -> str:
    """Choose "cpu" or "cuda": the device asked for (--device), or else cuda if there is one. Raises UserError for a GPU
    that torch cannot use."""
    if asked == "cpu":
        return "cpu"
    gpus = count_gpus("run on the CPU with --device cpu")
    if asked == "cuda" and not gpus:
        raise UserError("--device cuda: this torch sees no CUDA device; leave --device out to run on the CPU")
    return "cuda" if gpus else "cpu"


class Subject(NamedTuple):
    """A model ready to generate, the State of one sequence that it starts from (None: zeros), and its tokenizer."""

    model: LanguageModel
    start: State | None
    tokenizer: Tokenizer


def load_subject(args: Namespace, say: Callable[[str], object]) -> Subject:
    """Load the Subject that the flags of add_model_flags name. say(text) is called if the tokenizer differs from the
    recorded one, and is told of weights that are rounded. Raises UserError for files that cannot be read or do not fit
    together."""
    device = resolve_device(args.device)
    precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    sources = [source_of(args, path) for path in args.adapter]
    model, start = load_model(
        args.model, sources, precision, device, args.any_base, args.weights, say, args.keep_weights
    )
    if args.state:
        start = read_state_file(args.state, model, None if args.any_base else open_base(args.model))
    recorded = recorded_beside(*reversed(args.adapter), args.state, args.model)
    return Subject(model, start, find_tokenizer(args.tokenizer, model.config.vocab_size, recorded, say))


def read_state_file(path: str | Path, model: LanguageModel, base: Base | None = None) -> State:
    """Read the State of one sequence from a file of time states in any layout, the folder of a run that tuned them, or
    a saved session. Raises UserError if it does not fit the model, is of another generation, or names another base than
    `base` (None: any)."""
    file = read_states(path)
    file.check_generation(model.config.version)
    if base is not None:
        file.check_base(base)
    return read_state(file.tensors, model, path)


def save_state_file(path: str | Path, state: State, model: LanguageModel) -> None:
    """Write the State of one sequence as a saved session, in float32. Raises UserError if it cannot be written."""
    save_model(path, state_tensors(state, family_named(model.config.version).rows_are_keys))


def read_state(tensors: Mapping[str, torch.Tensor], model: LanguageModel, name: str | Path) -> State:
    """Make the State of one sequence from the {key: tensor} of a file called `name`. Raises UserError if it does not
    fit the model."""
    zeros = State.zeros(model.config, 1, model.emb.weight.device, model.emb.weight.dtype)
    return state_of(tensors, zeros, family_named(model.config.version).rows_are_keys, name)
