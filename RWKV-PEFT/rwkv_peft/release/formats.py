"""The table of the file formats of models and states: a new one is a Format and a line in FORMATS.

A model is read into {key: tensor} under official keys and written from a Base; time states are always {key: tensor}.
GGUF is written for llama.cpp through the optional `gguf` package. The generation names its tensors and their form
(Family.gguf_tensors): vectors and low-rank factors stay float32, large matrices get the requested type.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from ..checkpoints.atomic import atomic_write
from ..checkpoints.base import Base
from ..checkpoints.hf_folder import read_hf_model
from ..checkpoints.tensors import TensorSpec, dtype_name, read_safetensors, read_tensors, write_pth, write_safetensors
from ..cli.errors import UserError, summarize
from ..cli.names import all_finite
from ..data.chat import CHAT, ChatLayout
from ..models import official_tensors
from ..models.family import Family
from ..models.gguf import gguf_module
from ..models.layout import WKV
from ..models.state import is_time_state, swapped
from .vocabulary import GgufVocabulary, Tokenizer, gguf_template, gguf_vocabulary, hf_files

GGUF_TYPE = "f16"  # the default type of a GGUF's large matrices
Q8_RUN = 32  # q8_0 packs this many values of a row into one block
FLA, HF = "fla", "hf"  # values of --to
HF_FILES = ("model.safetensors", "config.json", "tokenizer_config.json", "tokenizer.json")


Writer = Callable[[Path, dict[str, TensorSpec], Iterable[tuple[str, torch.Tensor]]], None]


class Wanted(NamedTuple):
    """The settings for writing a model.

    dtype is its tensors' (None: each keeps its own); gguf_type the type of a GGUF's large matrices; tokenizer goes with
    it if the format holds one, with the template of the layout `chat`.
    """

    dtype: torch.dtype | None = None
    gguf_type: str = GGUF_TYPE
    tokenizer: Tokenizer | None = None
    chat: ChatLayout = CHAT


class Format(NamedTuple):
    """One file format: its names, its reader and its writers.

    endings are its files', ("",) for a folder; files(path) are the paths that it may write;
    read(path) -> {official key: tensor}; write_model(path, base, wanted) writes -> a summary. loaded_by is a phrase on
    the programs that load such a model; dtype is a model's default (None: each tensor keeps its own). vocabulary is
    True if it holds a tokenizer, states if time states alone may be written in it (state_file.py), states_in_model if
    its loaders may look for them in a model's file.
    """

    endings: tuple[str, ...]
    read: Callable[[Path], dict[str, torch.Tensor]]
    write_model: Callable[[Path, Base, Wanted], str]
    loaded_by: str
    dtype: torch.dtype | None = None
    vocabulary: bool = False
    states: bool = False
    states_in_model: bool = False
    files: Callable[[Path], list[Path]] = lambda path: [path]


def format_of(ending: str, to: str | None = None) -> Format | None:
    """The Format of an ending ("" for a folder, which --to fla lays out otherwise), None for an unknown ending."""
    return FLA_FOLDER if to == FLA else next((form for form in FORMATS if ending in form.endings), None)


def read_web(path: Path) -> dict[str, torch.Tensor]:
    """Read a .st or .safetensors in the layout of web-rwkv and Ai00 -> {official key: tensor}."""
    return web_tensors(read_safetensors(path)[0])


def web_tensors(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same of tensors that are read."""
    family, tensors = official_tensors(found, lambda family: family.from_web)
    turned = {key for key in tensors if family.swapped_in_web(key) or key.endswith(WKV)}
    return {key: swapped(tensor) if key in turned else tensor for key, tensor in tensors.items()}


def write_web(path: Path, base: Base, wanted: Wanted) -> str:
    family = base.family
    tensors = {
        family.to_web(key): swapped(tensor) if family.swapped_in_web(key) or key.endswith(WKV) else tensor
        for key, tensor in base.tensors.items()
    }
    return _write(path, write_safetensors, tensors, wanted.dtype)


def write_official(path: Path, base: Base, wanted: Wanted) -> str:
    return _write(path, write_pth, base.tensors, wanted.dtype)


def read_gguf(path: Path) -> NoReturn:
    raise UserError(f"{path}: GGUF files are written here and not read; give the .pth that it was made from")


def write_llama_cpp(path: Path, base: Base, wanted: Wanted) -> str:
    assert wanted.tokenizer is not None  # because the format's vocabulary is True
    vocabulary = gguf_vocabulary(wanted.tokenizer, base.config.vocab_size)._replace(chat=wanted.chat)
    with atomic_write(path) as temporary:
        number = write_gguf(temporary, base, wanted.gguf_type, vocabulary)
    return f"{number} tensors, the large ones {wanted.gguf_type}"


def write_hf_folder(folder: Path, base: Base, wanted: Wanted) -> str:
    return _write_folder(
        folder, base, wanted, base.family.hf_tensors(base.tensors), base.family.hf_settings(base.config)
    )


def write_fla_folder(folder: Path, base: Base, wanted: Wanted) -> str:
    return _write_folder(folder, base, wanted, *base.family.to_fla(base.tensors, base.config))


def _write_folder(
    folder: Path, base: Base, wanted: Wanted, tensors: Mapping[str, torch.Tensor], settings: dict[str, Any]
) -> str:
    """Write a folder of a model's tensors and its config.json, in one of two layouts.

    config.json is removed before the other files are replaced, and written last: a folder that was left between an old
    model and a new one has none, so readers refuse it.
    """
    tokenizer = wanted.tokenizer
    assert tokenizer is not None  # because the format's vocabulary is True
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_id)
    files = {"config.json": (json.dumps(settings, indent=2) + "\n").encode()}
    with ExitStack() as stack:  # renames the files after all are written, in reverse order, so config.json comes last
        for name, content in (files | hf_files(tokenizer, base.config.vocab_size, wanted.chat)).items():
            stack.enter_context(atomic_write(folder / name)).write_bytes(content)
        weights = stack.enter_context(atomic_write(folder / "model.safetensors"))
        _fill(weights, write_safetensors, tensors, wanted.dtype)
        (folder / "config.json").unlink(missing_ok=True)
    return describe(tensors, wanted.dtype)


HF_LOADER = (
    "transformers loads its tokenizer, and the model after `import rwkv_peft.hf`, by an RWKV-7 of its own if it has "
    "one (with heads of 64), or with trust_remote_code=True once the Python files of a published model of its "
    "generation (of RWKV-6 such as RWKV/v6-Finch-1B6-HF) lie beside it and config.json has that model's auto_map"
)
FOLDER = Format(
    ("",),
    read_hf_model,
    write_hf_folder,
    HF_LOADER,
    vocabulary=True,
    files=lambda path: [path / name for name in HF_FILES],
)
FLA_FOLDER = FOLDER._replace(
    write_model=write_fla_folder, loaded_by="flash-linear-attention loads it, and so does rwkv7-hf"
)
PTH_LOADERS = "rwkv, RWKV-Runner and ChatRWKV load it"
WEB_LOADERS = "it has the names of web-rwkv and Ai00, which need float16 (.st, or --dtype fp16)"
FORMATS = (
    Format((".pth",), read_tensors, write_official, PTH_LOADERS, states=True, states_in_model=True),
    Format((".safetensors",), read_web, write_web, WEB_LOADERS, states=True),
    Format((".st", ".state"), read_web, write_web, "web-rwkv and Ai00 load it", torch.float16, states=True),
    Format((".gguf",), read_gguf, write_llama_cpp, "llama.cpp loads it", vocabulary=True),
    FOLDER,
)


def _write(path: Path, writer: Writer, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> str:
    """Write tensors to a file as _fill does, atomically -> a summary."""
    with atomic_write(path) as temporary:
        _fill(temporary, writer, tensors, dtype)
    return describe(tensors, dtype)


def _fill(path: Path, writer: Writer, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Write tensors in place with write_pth or write_safetensors, cast to a dtype. Raises UserError as `cast` does."""
    writer(path, {key: TensorSpec.of(tensor, dtype) for key, tensor in tensors.items()}, cast(tensors, dtype))


def cast(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (key, tensor in a dtype), or in its own for None. Raises UserError for a value that is not finite then."""
    for key, tensor in tensors.items():
        result = tensor.to(dtype or tensor.dtype)
        if not all_finite(result):
            raise UserError(f"{key} holds NaN, Inf or values beyond {result.dtype}; choose another --dtype")
        yield key, result


def describe(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> str:
    """Write the number of tensors and their dtypes after the cast to dtype (None: they keep theirs)."""
    dtypes = dict.fromkeys(dtype_name(dtype or tensor.dtype) for tensor in tensors.values())
    return f"{len(tensors)} tensors, {' and '.join(dtypes)}"


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
        raise UserError(f"GGUF files take the gguf package ({summarize(error)}): pip install --upgrade gguf") from error
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
    writer.add_chat_template(gguf_template(vocabulary.chat))
    writer.add_add_bos_token(False)
