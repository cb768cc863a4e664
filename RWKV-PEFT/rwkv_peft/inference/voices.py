"""Voices, which answer under a name: a model, or the same model with an adapter or a state of its own.

Voices of one base share its weights. An adapter stays beside them as layers of its method, and only the tensors that it
replaces whole are copies. If it was trained on a quantized base, or on one that something was taken out of, its merged
weights take its place, because the base of its training is not in memory; so they do, rounded alike, if the matrices in
memory are rounded to blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.inject import inject, load_tensors
from ..checkpoints.adapters import AdapterSource
from ..checkpoints.base import Base
from ..models.parts import LanguageModel
from ..models.state import State, split_time_states
from ..release.merge import Merge, check_fingerprints
from .loading import read_state, read_state_file
from .stepping import step_by_tape
from .weights import decoding, quantize_products, rounded


@dataclass(frozen=True, eq=False)
class Voice:
    """One that answers under a name: a model, and the State of one sequence that it starts from (None: zeros)."""

    name: str
    model: LanguageModel
    start: State | None = None


def state_voice(name: str, path: str | Path, voice: Voice, base: Base | None) -> Voice:
    """A voice that starts from a file's state. Raises UserError as read_state_file does."""
    return Voice(name, voice.model, read_state_file(path, voice.model, base))


def adapter_voice(name: str, source: AdapterSource, voice: Voice, base: Base, any_base: bool) -> Voice:
    """The voice of a Base with an adapter. any_base allows an adapter of another base of the same shape. Raises
    UserError for a file that is no adapter or does not fit."""
    adapter = source.read(base.tensors)
    pairs = [(source.path, adapter)]
    if not any_base:
        check_fingerprints(base, pairs)
    merge = Merge(base, pairs)  # refuses what does not fit
    own, states = split_time_states(adapter.tensors)
    model, metadata = voice.model, adapter.metadata
    residual = metadata.method is not None and metadata.method.residual is not None
    if metadata.quant != "none" or residual or rounded(model):
        merged = {key: rows for key, rows in merge.tensors(base.tensors.items()) if key in merge.changes}
        model = sharing(model, base, split_time_states(merged)[0])
    elif own:
        model = sharing(model, base, adapter.whole())
        inject(model, adapter.config(base.family), family=base.family, initial=adapter.tensors)
        load_tensors(model, own, source.path)
    model.requires_grad_(False).eval()
    if model.emb.weight.is_cpu:
        decoding(model)
        step_by_tape(model)
    return Voice(name, model, read_state(states, model, source.path) if states else voice.start)


def sharing(model: LanguageModel, base: Base, replaced: Mapping[str, torch.Tensor]) -> LanguageModel:
    """Another model over the weights of `model`, with copies of `replaced` {key: tensor} in place of some; a matrix
    that replaces a rounded one is rounded alike."""
    weights, blocks = dict(model.state_dict()), rounded(model)
    copies = {key: tensor.to(weights[key], copy=True) for key, tensor in replaced.items() if key in weights}
    matrices = {f"{name}.weight": name for name in blocks}
    missing = {key: replaced.get(key, base.tensors[key]) for key in matrices}
    other = base.family.load(weights | copies | missing, base.config)
    for key, name in matrices.items():
        if key not in replaced:
            other.set_submodule(name, blocks[name])
    if blocks:
        bits = next(iter(blocks.values())).weight.bits
        quantize_products(other, f"int{bits}", lambda text: None)
    return other.to(model.emb.weight.device)
