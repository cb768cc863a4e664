"""The settings that rebuild the layers of an adapter's file."""

from ..adapters.methods import words_of
from ..config import AdapterConfig
from ..files.adapter_file import Adapter
from ..models.family import Family
from ..names import NONE


def adapter_config(adapter: Adapter, family: Family) -> AdapterConfig:
    """The AdapterConfig that rebuilds the layers of an Adapter: their places and shapes."""
    metadata = adapter.metadata
    # files of other tools name single tensors, not parts; they need none, because every tensor of a file is loaded
    parts = tuple(part for part in metadata.train_parts if part in family.parts)
    targets = tuple(adapter.modules()) or tuple(metadata.targets)  # some files adapt only some layers
    if metadata.method is None:
        return AdapterConfig(method=NONE, targets=targets, train_parts=parts)
    return AdapterConfig(
        **words_of(metadata.method),
        **{field: getattr(metadata, field) for field in metadata.method.tensors.size},
        alpha=metadata.alpha,
        targets=targets,
        train_parts=parts,
        quant=metadata.quant,
    )
