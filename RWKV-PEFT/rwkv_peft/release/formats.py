"""The formats in which a model or its states lie in files, as a table: a new one is a Format and a line in FORMATS.

A model is read into {key: tensor} under official keys, and written from a Base; time states are {key: tensor} alone.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import UserError
from ..files.atomic import atomic_write
from ..files.pth import all_finite, read_tensors
from ..files.pth_writer import TensorSpec, write_pth
from ..files.safetensors_file import read_safetensors, write_safetensors
from ..models import FAMILIES
from ..models.state import is_time_state, swapped
from .gguf import write_gguf
from .vocabulary import WORLD_FILE, gguf_vocabulary, hf_files

HF_FILES = ("model.safetensors", "config.json", "tokenizer_config.json", "tokenizer.json", WORLD_FILE)


class Wanted(NamedTuple):
    """How a model is to be written: dtype of its tensors (None: each keeps its own), type of a GGUF's large matrices,
    and the tokenizer whose vocabulary goes along, where the format holds one."""

    dtype: torch.dtype | None = None
    gguf_type: str = "f16"
    tokenizer: object = None


class Format(NamedTuple):
    """endings are those of its files' names, ("",) for a folder; files(path) are the paths that it may write;
    read(path) -> {official key: tensor}; write_model(path, base, wanted) and write_states(path, tensors, dtype) write,
    None where it has no place for such; loaded_by tells what loads a model of it; dtype is a model's where none is
    asked for (None: each tensor keeps its own); vocabulary says whether a tokenizer goes into it."""

    endings: tuple[str, ...]
    read: Callable
    write_model: Callable | None
    write_states: Callable | None
    loaded_by: str
    dtype: torch.dtype | None = None
    vocabulary: bool = False
    files: Callable = lambda path: [path]


def format_of(path):
    """The Format that a path's ending names, None for an unknown ending."""
    return next((form for form in FORMATS if path.suffix in form.endings), None)


def read_web(path):
    """A .st or .safetensors as web-rwkv and Ai00 have it."""
    found = read_safetensors(path)[0]
    family, tensors = _official(found, lambda family: family.from_web)
    turned = {key for key in tensors if family.swapped_in_web(key) or is_time_state(key)}
    return {key: swapped(tensor) if key in turned else tensor for key, tensor in tensors.items()}


def write_web(path, base, wanted):
    family = base.family
    tensors = {
        family.to_web(key): swapped(tensor) if family.swapped_in_web(key) or is_time_state(key) else tensor
        for key, tensor in base.tensors.items()
    }
    _write(path, write_safetensors, tensors, wanted.dtype)


def write_web_states(path, tensors, dtype):
    _write(path, write_safetensors, {key: swapped(tensor) for key, tensor in tensors.items()}, dtype)


def write_official(path, base, wanted):
    _write(path, write_pth, base.tensors, wanted.dtype)


def write_official_states(path, tensors, dtype):
    _write(path, write_pth, tensors, dtype)


def read_gguf(path):
    raise UserError(f"{path}: GGUF files are written here and not read; give the .pth that it was made of")


def write_llama_cpp(path, base, wanted):
    vocabulary = gguf_vocabulary(wanted.tokenizer, base.config.vocab_size)
    with atomic_write(path) as temporary:
        write_gguf(temporary, base, wanted.gguf_type, vocabulary)


def read_hf_model(path):
    """A folder with the layout of a generation's Hugging Face model."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} is a folder without .safetensors files; is it a Hugging Face model?")
    found = {}
    for file in files:
        found |= read_safetensors(file)[0]
    return _official(found, lambda family: family.from_hf)[1]


def write_hf_folder(folder, base, wanted):
    """A folder with the layout of the generation's Hugging Face models."""
    family, config, tokenizer = base.family, base.config, wanted.tokenizer
    end = tokenizer.end_id
    settings = family.hf_settings(config) | {"bos_token_id": end, "eos_token_id": end}
    tensors = {family.to_hf(key): tensor for key, tensor in base.tensors.items()}
    _write(folder / "model.safetensors", write_safetensors, tensors, wanted.dtype)
    files = {"config.json": (json.dumps(settings, indent=2) + "\n").encode()}
    for name, content in (files | hf_files(tokenizer, config.vocab_size, family.hf_tokenizer)).items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)


HF_LOADER = (
    "transformers loads it with trust_remote_code=True, once the Python files of a published RWKV-6 model (such as "
    "RWKV/v6-Finch-1B6-HF) lie beside it and config.json has that model's auto_map"
)
FORMATS = (
    Format((".pth",), read_tensors, write_official, write_official_states, "rwkv, RWKV-Runner and ChatRWKV load it"),
    Format(
        (".safetensors",),
        read_web,
        write_web,
        write_web_states,
        "it has the names of web-rwkv and Ai00, which need float16 (.st, or --dtype fp16)",
    ),
    Format((".st", ".state"), read_web, write_web, write_web_states, "web-rwkv and Ai00 load it", torch.float16),
    Format((".gguf",), read_gguf, write_llama_cpp, None, "llama.cpp loads it", vocabulary=True),
    Format(
        ("",),
        read_hf_model,
        write_hf_folder,
        None,
        HF_LOADER,
        vocabulary=True,
        files=lambda path: [path / name for name in HF_FILES],
    ),
)


def _official(tensors, naming):
    """(the Family, {official key: tensor}) of tensors under other names, which naming(family) turns into official ones;
    the first Family where none knows them."""
    named = [(family, {naming(family)(key): tensor for key, tensor in tensors.items()}) for family in FAMILIES]
    return next((pair for pair in named if pair[0].sign in pair[1]), named[0])


def _write(path, writer, tensors, dtype):
    """Write tensors with write_pth or write_safetensors, cast to a dtype (None: each keeps its own) that holds every
    value."""

    def cast():
        for key, tensor in tensors.items():
            result = tensor.to(dtype or tensor.dtype)
            if not all_finite(result):
                raise UserError(f"{key} holds NaN, Inf or values beyond {result.dtype}; choose another --dtype")
            yield key, result

    with atomic_write(Path(path)) as temporary:
        writer(temporary, {key: TensorSpec.of(tensor, dtype) for key, tensor in tensors.items()}, cast())
