"""Models over one base's memory: speakers, which answer under a name with an adapter or a state of their own, and
mirrors, which decode for a module that others read and train.

An adapter stays beside the shared weights as layers of its method, and only tensors that it replaces whole are copies.
So do several at scales of their own, which share the layers of their speakers.
If it was trained on a quantized base, or with a residual of the base, its merged weights take their place, because that
base is not in memory. So they do, rounded alike, if the matrices in memory are rounded to blocks.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.inject import inject, load_tensors
from ..adapters.layer import ScaledLinear
from ..checkpoints.adapter_file import Adapter
from ..checkpoints.adapters import AdapterSource
from ..checkpoints.base import Base, fingerprint
from ..models.parts import LanguageModel
from ..models.state import State, is_time_state, keyed, split_time_states
from ..release.compatibility import Adapters
from ..release.merge import Merge, MergeOptions, check_fingerprints
from .forward import speed_up
from .loading import read_state, read_state_file
from .weights import FrozenLinear, place, quantize_products, rounded


@dataclass(frozen=True, eq=False)
class Speaker:
    """A model that answers under a name, from the State of one sequence on (None: zeros), and its adapter's path and
    content if it has one. Speakers of one `digest` ("": unknown) compute the same."""

    name: str
    model: LanguageModel
    start: State | None = None
    adapter: tuple[str | Path, Adapter] | None = None
    digest: str = ""

    @property
    def identity(self) -> object:
        """A key by which prefixes that it has read are cached."""
        return self.digest or self

    def beginning(self, other: "Speaker") -> "Speaker":
        """The speaker from the start of another one."""
        return Speaker(self.name, self.model, other.start, digest=combined(self, other))


def combined(*parts: object) -> str:
    """A digest of what a speaker is made of; "" if a speaker among these has none."""
    found = [part.digest if isinstance(part, Speaker) else str(part) for part in parts]
    return hashlib.sha256(" ".join(found).encode()).hexdigest()[:32] if all(found) else ""


def state_speaker(name: str, path: str | Path, speaker: Speaker, base: Base | None) -> Speaker:
    """A speaker that starts from a file's state. Raises UserError as read_state_file does."""
    start = read_state_file(path, speaker.model, base)
    return Speaker(name, speaker.model, start, digest=combined(speaker, fingerprint(dict(keyed(start)))))


def adapter_speaker(name: str, source: AdapterSource, speaker: Speaker, base: Base, any_base: bool) -> Speaker:
    """The speaker of a Base with an adapter; any_base allows one of another base of the same shape. Raises UserError
    for a file that is no adapter or does not fit."""
    adapter = source.read(base.tensors)
    pair = source.path, adapter
    if not any_base:
        check_fingerprints(base, [pair])
    model, start, complete = with_replaced(speaker, base, [pair])
    own = split_time_states(adapter.tensors)[0]
    if not complete:
        inject(model, adapter.config(base.family), family=base.family, initial=adapter.tensors)
        load_tensors(model, own, source.path)
    digest = combined(speaker, fingerprint(adapter.tensors), adapter.metadata)
    return Speaker(name, settled(model, speaker), start, pair, digest)


def mixed_speaker(name: str, parts: Sequence[tuple[Speaker, float]], speaker: Speaker, base: Base) -> Speaker:
    """The speaker of a Base with the adapters of speakers at scales, as merging would apply them, in their order; it
    shares their layers. Raises UserError for a change that is lost in the model's dtype."""
    adapters = [(*own.adapter, scale) for own, scale in parts if own.adapter is not None]
    pairs = [(path, adapter._replace(amount=scale)) for path, adapter, scale in adapters]
    model, start, complete = with_replaced(speaker, base, pairs)
    places: dict[str, list[tuple[Any, float]]] = {}
    for (own, scale), (_, adapter) in zip(parts, pairs):
        for module in () if complete else adapter.modules():
            places.setdefault(module, []).append((own.model.get_submodule(module), scale))
    for module, layers in places.items():
        linear: Any = model.get_submodule(module)
        model.set_submodule(module, ScaledLinear(linear, layers))
    digest = combined(speaker, *(part for own in parts for part in own))
    return Speaker(name, settled(model, speaker), start, digest=digest)


def with_replaced(speaker: Speaker, base: Base, pairs: Adapters) -> tuple[LanguageModel, State | None, bool]:
    """A model over a speaker's memory with copies of the tensors that (path, Adapter) pairs replace, the State that it
    starts from, and True if these are all of the adapters' changes: because they change no other tensor, or as merged
    weights."""
    model = speaker.model
    merge = Merge(base, pairs, MergeOptions(model.emb.weight.dtype))  # refuses an adapter that does not fit
    weights, states = split_time_states(merge.whole(base))
    own = [key for key in merge.changes if not is_time_state(key)]
    methods = [(adapter.metadata.quant, adapter.metadata.method) for _, adapter in pairs]
    merged = any(quant != "none" or (method is not None and method.residual is not None) for quant, method in methods)
    merged = merged or bool(rounded(model)) or any(len({*map(type, found)}) > 1 for found in merge.changes.values())
    if own and merged:
        weights = {key: rows for key, rows in merge.tensors(base.tensors.items()) if key in own}
    start = read_state(states, model, ", ".join(str(path) for path, _ in pairs)) if states else speaker.start
    return sharing(model, base, weights) if own else model, start, merged or not own


def settled(model: LanguageModel, speaker: Speaker) -> LanguageModel:
    """A new model over a speaker's memory, frozen and ready to decode."""
    if model is not speaker.model:
        model.requires_grad_(False).eval()
        if model.emb.weight.is_cpu:
            speed_up(model)
    return model


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


class DecodingCopy:
    """A second model over a module's memory, which decodes as `rwkv-peft generate` does while the module stays plain
    for those who train, copy or adapt it. It is made at first use, and again after the weights were written to."""

    def __init__(self) -> None:
        self._decoding: LanguageModel | None = None
        self._weights: list[tuple[int, int]] = []
        self._kinds: dict[str, type[nn.Module]] = {}  # of the generation's modules
        self._shapes: dict[str, torch.Size] = {}  # of their tensors

    def __reduce__(self) -> tuple[type["DecodingCopy"], tuple[()]]:
        return DecodingCopy, ()  # a copy of the model gets its own

    def of(self, model: LanguageModel, base: Base) -> LanguageModel:
        """The model that decodes for a model of a Base: its mirror, or itself on a GPU, where CUDA graphs serve, and if
        it has modules, shapes or hooks that its generation does not."""
        if not self._kinds:
            with torch.device("meta"):
                plain = base.family.build(base.config)
            self._kinds, self._shapes = module_kinds(plain), {key: x.shape for key, x in plain.state_dict().items()}
        if not model.emb.weight.is_cpu or not self._is_plain(model):
            self._decoding = None
            return model
        if self._decoding is None or self._weights != weight_versions(model):
            if not any(parameter.requires_grad for parameter in model.parameters()):
                place(model)  # an optimizer's parameters must stay where they are
            self._decoding = sharing(model, base, {}).requires_grad_(False).eval()
            speed_up(self._decoding)
            self._weights = weight_versions(model)
        return self._decoding

    def _is_plain(self, model: LanguageModel) -> bool:
        """True if the model has the modules of its generation, or products in blocks, and no hooks."""
        found = module_kinds(model)
        return (
            found.keys() == self._kinds.keys()
            and all(kind in (self._kinds[name], FrozenLinear) for name, kind in found.items())
            and all(is_time_state(key) or self._shapes.get(key) == x.shape for key, x in model.state_dict().items())
            and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        )


def module_kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules() if name}


def weight_versions(model: nn.Module) -> list[tuple[int, int]]:
    """Each parameter's address, and the number of writes to it."""
    return [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in model.parameters()]
