"""GGUF files: writes them for llama.cpp through the optional `gguf` package, and reads the header of any.

The generation names the tensors and their form (Family.gguf_tensors). Vectors and low-rank factors stay float32; the
large matrices get the requested type. The package's own reader makes an object for everything that a header announces,
so the header is read here (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from ..checkpoints.base import Base
from ..checkpoints.readable import require_readable
from ..cli.errors import UserError, told
from ..models.family import Family
from ..models.gguf import gguf_module
from ..models.state import is_time_state
from .vocabulary import GGUF_TEMPLATE, GgufVocabulary, cleaning

Q8_RUN = 32  # q8_0 packs this many values of a row into one block
Value = bool | int | float | str | list[bool | int | float | str]
# GGUF's number of a type -> its struct format
NUMBERS = MappingProxyType({0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"})
TEXT, LIST = 8, 9


def write_gguf(path: str | Path, base: Base, kind: str, vocabulary: GgufVocabulary) -> int:
    """Write a Base as GGUF, tensor by tensor -> the number of tensors.

    kind, one of names.GGUF_TYPES, is the type of the large matrices (f16 instead of q8_0 for one with rows that
    q8_0 cannot hold); vocabulary is a GgufVocabulary of the model's size.
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
    return len(plan)


def write_gguf_lora(path: str | Path, family: Family, factors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write {module: {lora_A (r, in), lora_B (out, r)}} as llama.cpp's LoRA adapter, in float32, at a scale of 1."""
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
    """Import the gguf package. Raises UserError with the reason and the remedy if that fails."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"GGUF files take the gguf package ({told(error)}): pip install --upgrade gguf") from error
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
    writer.add_chat_template(cleaning(GGUF_TEMPLATE, vocabulary.clean))
    writer.add_add_bos_token(False)


class GgufTensor(NamedTuple):
    name: str
    size: int  # in numbers
    kind: int  # ggml's number of the type


class GgufHeader(NamedTuple):
    """The header of a GGUF: settings by name, and the tensors."""

    settings: dict[str, Value]
    tensors: list[GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Read the GgufHeader of a file. Raises UserError if the file is missing or its header is damaged."""
    require_readable(path, f"{path} does not exist; check the name", again=True)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return HeaderReader(mapped).header()
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no readable GGUF: {told(error)}; copy it again") from error


class HeaderReader:
    """A reader of a GGUF's header, from its beginning on. Raises ValueError for bytes that are no header, and for a
    header that runs past the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def header(self) -> GgufHeader:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, count = self.numbers("IQQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are known")
        header = GgufHeader({}, [])
        for _ in range(count):
            name, (kind,) = self.text(), self.numbers("I")
            if kind == LIST:
                inner, length = self.numbers("IQ")
                header.settings[name] = list(self.values(inner, length))
            else:
                header.settings[name] = self.values(kind, 1)[0]
        for _ in range(tensors):
            name, (dimensions,) = self.text(), self.numbers("I")
            shape = self.numbers("Q", dimensions)
            kind, _offset = self.numbers("IQ")
            header.tensors.append(GgufTensor(name, math.prod(shape), kind))
        return header

    def values(self, kind: int, count: int) -> Sequence[Any]:
        """Read values of a type. Raises ValueError for a list or an unknown type."""
        if kind == TEXT:
            return [self.text() for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"it has a list of lists, or a value of the unknown type {kind}")
        return self.numbers(NUMBERS[kind], count)

    def numbers(self, form: str, count: int = 1) -> Sequence[Any]:
        """Read numbers of a struct format, or `count` of one type."""
        data = self.take(struct.calcsize(f"<{form}") * count)
        return struct.unpack(f"<{form}" if count == 1 else f"<{count}{form}", data)

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.place:
            raise ValueError(f"it ends within {length:,} bytes that it announces")
        self.place += length
        return self.data[self.place - length : self.place]

    def text(self) -> str:
        return self.take(self.numbers("Q")[0]).decode("utf-8")
