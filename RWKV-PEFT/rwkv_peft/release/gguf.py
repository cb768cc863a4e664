"""GGUF files for llama.cpp, written through the optional `gguf` package.

Which tensors there are, under which names and in which form, is the generation's to say (Family.gguf_tensors). Vectors
and low-rank factors stay float32, and the large matrices take the type asked for.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..errors import UserError
from ..files.base import Base
from ..models.state import is_time_state

Q8_RUN = 32  # q8_0 packs runs of this many values of a row


def write_gguf(
    path: str | Path, base: Base, kind: str = "f16", vocabulary: Sequence[bytes | None] | None = None
) -> None:
    """Write a Base as GGUF, tensor by tensor.

    kind, one of names.GGUF_TYPES, is the type of the large matrices (one whose rows q8_0 cannot hold becomes f16);
    vocabulary is a list of bytes per token id (None for ids that stand for nothing), padded to the model's size.
    Raises UserError where the gguf package is missing or the model holds time states, which GGUF cannot.
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
        _write_vocabulary(writer, config, gguf.LlamaFileType[_file_type(kind)], vocabulary)
        types = {name: _type_of(gguf, shape, kind if large else "f32") for name, shape, _, large in plan}
        for name, shape, _, _ in plan:
            # the package takes every type as the bytes that it is stored in
            stored = gguf.quants.quant_shape_to_byte_shape(shape, types[name])
            writer.add_tensor_info(name, stored, np.dtype("uint8"), math.prod(stored), types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, make, _ in plan:
            writer.write_tensor_data(gguf.quants.quantize(make().float().contiguous().numpy(), types[name]))


def import_gguf() -> ModuleType:
    """The gguf package, or a UserError that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("writing GGUF needs the gguf package: pip install gguf") from error
    return gguf


def _type_of(gguf: ModuleType, shape: Sequence[int], kind: str) -> Any:
    """The type of a tensor that is to be of this kind."""
    if kind == "q8_0" and shape[-1] % Q8_RUN:
        kind = "f16"
    return gguf.GGMLQuantizationType[kind.upper()]


def _file_type(kind: str) -> str:
    return "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"


def _write_vocabulary(
    writer: Any, config: ModelConfig, file_type: Any, vocabulary: Sequence[bytes | None] | None
) -> None:
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("rwkv")
    tokens, types = [], []
    for token in range(config.vocab_size):
        content = vocabulary[token] if vocabulary is not None and token < len(vocabulary) else None
        # llama.cpp reads a token as the inside of a Python bytes literal
        text = "<s>" if token == 0 else f"[PAD{token}]" if content is None else repr(content)[2:-1]
        tokens.append(text.encode())
        types.append(3 if token == 0 else 5 if content is None else 1)  # control, unused, normal
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
