"""The formats in which a model or its states lie in files, as a table: a new one is a Format and a line in FORMATS.

A model is read into {key: tensor} under official keys, and written from a Base; time states are {key: tensor} alone.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..data.tokenizer import WorldTokenizer
from ..errors import UserError
from ..files.atomic import atomic_write
from ..files.pth import all_finite, read_tensors
from ..files.pth_writer import TensorSpec, write_pth
from ..files.safetensors_file import read_safetensors, write_safetensors
from ..models import FAMILIES
from ..models.state import is_time_state, swapped
from .gguf import write_gguf

VOCABULARY = "rwkv_vocab_v20230424.txt"
HF_FILES = ("model.safetensors", "config.json", "tokenizer_config.json", VOCABULARY)


class Format(NamedTuple):
    """endings are those of its files' names, ("",) for a folder; files(path) are the paths that it writes; read(path)
    -> {official key: tensor}; write_model(path, base, dtype, gguf_type) and write_states(path, tensors, dtype) write,
    None where it has no place for such; dtype is a model's where none is asked for (None: each tensor keeps its
    own)."""

    endings: tuple[str, ...]
    read: Callable
    write_model: Callable | None
    write_states: Callable | None
    dtype: torch.dtype | None = None
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


def write_web(path, base, dtype, gguf_type):
    family = base.family
    tensors = {
        family.to_web(key): swapped(tensor) if family.swapped_in_web(key) or is_time_state(key) else tensor
        for key, tensor in base.tensors.items()
    }
    _write(path, write_safetensors, tensors, dtype)


def write_web_states(path, tensors, dtype):
    _write(path, write_safetensors, {key: swapped(tensor) for key, tensor in tensors.items()}, dtype)


def write_official(path, base, dtype, gguf_type):
    _write(path, write_pth, base.tensors, dtype)


def write_official_states(path, tensors, dtype):
    _write(path, write_pth, tensors, dtype)


def read_gguf(path):
    raise UserError(f"{path}: GGUF files are written here and not read; give the .pth that it was made of")


def write_llama_cpp(path, base, dtype, gguf_type):
    with atomic_write(path) as temporary:
        write_gguf(temporary, base, gguf_type, vocabulary(base.config.vocab_size))


def read_hf_model(path):
    """A folder with the layout of a generation's Hugging Face model."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} is a folder without .safetensors files; is it a Hugging Face model?")
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} has no config.json, which is written last: its conversion or download was interrupted, and its "
            "files may be of two models; make it again"
        )
    found = {}
    for file in files:
        found |= read_safetensors(file)[0]
    return _official(found, lambda family: family.from_hf)[1]


def write_hf_folder(folder, base, dtype, gguf_type):
    """A folder with the layout of the generation's Hugging Face models. config.json goes before the others change
    and comes when they have: a folder that was left between an old model and a new one has none, which readers refuse.
    """
    family, config = base.family, base.config
    tokenizer = {
        "tokenizer_class": family.hf_tokenizer,
        "bos_token": "<s>",
        "eos_token": "<s>",
        "unk_token": "<s>",
        "add_prefix_space": False,
    }
    tensors = {family.to_hf(key): tensor for key, tensor in base.tensors.items()}
    with (  # the files get their names when all are written, the last of them first
        atomic_write(folder / "config.json") as settings,
        atomic_write(folder / "model.safetensors") as weights,
        atomic_write(folder / "tokenizer_config.json") as tokenizer_settings,
        atomic_write(folder / VOCABULARY) as words,
    ):
        settings.write_text(json.dumps(family.hf_settings(config), indent=2) + "\n")
        _fill(weights, write_safetensors, tensors, dtype)
        tokenizer_settings.write_text(json.dumps(tokenizer, indent=2) + "\n")
        words.write_bytes(world_vocabulary_file(config.vocab_size))
        (folder / "config.json").unlink(missing_ok=True)


FORMATS = (
    Format((".pth",), read_tensors, write_official, write_official_states),
    # web-rwkv needs fp16
    Format((".safetensors", ".st", ".state"), read_web, write_web, write_web_states, torch.float16),
    Format((".gguf",), read_gguf, write_llama_cpp, None),
    Format(("",), read_hf_model, write_hf_folder, None, files=lambda path: [path / name for name in HF_FILES]),
)


def vocabulary(size):
    """Bytes of the first `size` tokens of the World vocabulary, of which every RWKV-6 vocabulary here is a prefix."""
    return WorldTokenizer().token_bytes[:size]


def world_vocabulary_file(size):
    """The first tokens of the World vocabulary's file, whose lines are: id, literal, length."""
    lines = WorldTokenizer().path.read_bytes().replace(b"\r\n", b"\n").splitlines(keepends=True)
    return b"".join(line for line in lines if int(line.split(b" ", 1)[0]) < size)


def _official(tensors, naming):
    """(the Family, {official key: tensor}) of tensors under other names, which naming(family) turns into official ones;
    the first Family where none knows them."""
    named = [(family, {naming(family)(key): tensor for key, tensor in tensors.items()}) for family in FAMILIES]
    return next((pair for pair in named if pair[0].sign in pair[1]), named[0])


def _write(path, writer, tensors, dtype):
    """Write tensors to a file as _fill does, atomically."""
    with atomic_write(Path(path)) as temporary:
        _fill(temporary, writer, tensors, dtype)


def _fill(path, writer, tensors, dtype):
    """Write tensors in place with write_pth or write_safetensors, cast to a dtype (None: each keeps its own) that holds
    every value."""

    def cast():
        for key, tensor in tensors.items():
            result = tensor.to(dtype or tensor.dtype)
            if not all_finite(result):
                raise UserError(f"{key} holds NaN, Inf or values beyond {result.dtype}; choose another --dtype")
            yield key, result

    writer(path, {key: TensorSpec.of(tensor, dtype) for key, tensor in tensors.items()}, cast())
