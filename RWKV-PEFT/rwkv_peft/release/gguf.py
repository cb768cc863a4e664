"""Write GGUF files for llama.cpp through the optional `gguf` package.

The generation says which tensors there are, with their names and form (Family.gguf_tensors). Vectors and low-rank
factors stay float32; the large matrices get the type asked for.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..files.base import Base
from ..models.family import Family
from ..models.gguf import gguf_module
from ..models.state import is_time_state
from .vocabulary import CHAT_TEMPLATE, GgufVocabulary

Q8_RUN = 32  # q8_0 packs this many values of a row into one block


def write_gguf(path: str | Path, base: Base, kind: str, vocabulary: GgufVocabulary) -> None:
    """Write a Base as GGUF, tensor by tensor.

    kind, one of names.GGUF_TYPES, is the type of the large matrices (f16 instead of q8_0 for one whose rows q8_0
    cannot hold); vocabulary is a GgufVocabulary of the model's size.
    Raises UserError if the gguf package is missing, or if the model holds time states, which GGUF cannot.
    """
    gguf = import_gguf()
    family, config = base.family, base.config
    states = [key for key in base.tensors if is_time_state(key)]
    if states:
        raise UserError(
            f"GGUF has no place for initial states, and the model holds {len(states)} (such as "
            f"{states[0]}); convert the model without them"
        )
    plan = list(family.gguf_tensors(base.tensors, config))
    with closing(gguf.GGUFWriter(str(path), family.gguf_architecture)) as writer:
        for name, value in family.gguf_settings(config):
            getattr(writer, name)(value)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
        _write_vocabulary(writer, vocabulary)
        types = {name: _type_of(gguf, shape, kind if large else "f32") for name, shape, _, large in plan}
        for name, shape, _, _ in plan:
            # the package takes a tensor of any type as its stored bytes
            stored = gguf.quants.quant_shape_to_byte_shape(shape, types[name])
            writer.add_tensor_info(name, stored, np.dtype("uint8"), math.prod(stored), types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, make, _ in plan:
            writer.write_tensor_data(gguf.quants.quantize(make().float().contiguous().numpy(), types[name]))


def write_gguf_lora(path: str | Path, family: Family, factors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write {module: {lora_A (r, in), lora_B (out, r)}} of adapted layers as llama.cpp's LoRA adapter, in float32, at a
    scale of 1."""
    if not family.gguf_architecture:
        raise family.formless("GGUF")
    gguf = import_gguf()
    rank = next(iter(factors.values()))["lora_A"].shape[0]
    with closing(gguf.GGUFWriter(str(path), family.gguf_architecture)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # llama.cpp divides it by the rank
        for module, tensors in factors.items():
            for name, tensor in tensors.items():
                writer.add_tensor(f"{gguf_module(module)}.weight.{name.lower()}", tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def import_gguf() -> ModuleType:
    """Import the gguf package. Raises UserError, which says how to install it, if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files take the gguf package: pip install gguf") from error
    return gguf


def _type_of(gguf: ModuleType, shape: Sequence[int], kind: str) -> Any:
    """The ggml type of a tensor of this kind; f16 instead of q8_0 for rows that q8_0 cannot hold."""
    if kind == "q8_0" and shape[-1] % Q8_RUN:
        kind = "f16"
    return gguf.GGMLQuantizationType[kind.upper()]


def _write_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.end is not None:
        writer.add_bos_token_id(vocabulary.end)
        writer.add_eos_token_id(vocabulary.end)
    if vocabulary.turn_end is not None:
        writer.add_eot_token_id(vocabulary.turn_end)
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.add_add_bos_token(False)
