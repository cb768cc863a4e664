"""Describe a file or folder: `rwkv-peft inspect FILE`.

A file may hold a model, an adapter or states, in any format that is read here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..adapters.methods import adapter_parameter
from ..checkpoints.adapter_file import METADATA_KEY, Adapter
from ..checkpoints.adapter_folders import is_adapter_folder, is_lightning
from ..checkpoints.adapters import AdapterSource, product_of_run, source_of
from ..checkpoints.base import Base, base_of
from ..checkpoints.hf_folder import read_hf_model
from ..checkpoints.readable import require_file
from ..checkpoints.rwkv_peft_file import unwrapped
from ..checkpoints.tensors import dtype_name, read_safetensors, read_tensors
from ..cli.errors import UserError, in_line, short
from ..cli.parser import counted
from ..models.layout import WKV, is_time_state, state_parts
from ..models.state import check_time_states
from .flags import inspect_flags
from .formats import web_tensors

Line = tuple[str, str]
MODEL, ADAPTER, UNKNOWN = "model", "adapter", ""  # what a file may hold
STATES, SHIFTED = "states", "states with shifts"  # likewise; a saved session has the latter, too
SHOWN = 3  # keys of a foreign file that are quoted


def main(argv: list[str]) -> int:
    args = inspect_flags(argv)
    print(formatted(contents_of(source_of(args, args.file)).lines))
    return 0


class Contents(NamedTuple):
    """The description of a file: lines (name, value); the Base or Adapter in it, or None; and its kind:
    MODEL, ADAPTER, STATES, SHIFTED or UNKNOWN."""

    lines: list[Line]
    holds: Base | Adapter | None = None
    what: str = UNKNOWN


def contents_of(source: AdapterSource) -> Contents:
    """Read the Contents of source.path, a file or a folder. Raises UserError if it holds no tensors at all."""
    path = product_of_run(source.path, tell=True)
    source = replace(source, path=path)
    if path.suffix == ".gguf":
        return gguf_contents(path)
    if path.is_dir():
        if is_adapter_folder(path) or is_lightning(path):
            return adapter_contents(source)
        return tensor_contents(read_hf_model(path), path, "Hugging Face")
    if path.suffix in (".safetensors", ".st", ".state"):
        tensors, header = read_safetensors(path)
        if METADATA_KEY in header:
            return adapter_contents(source)
        return tensor_contents(web_tensors(tensors), path, "web-rwkv, Ai00")
    if is_lightning(path):
        return adapter_contents(source)
    tensors = read_tensors(path)
    if any(adapter_parameter(key) for key in tensors) and "emb.weight" not in tensors:
        return foreign_adapter_contents(source, tensors)
    if all(map(is_time_state, tensors)):
        tensors = unwrapped(tensors)
    return tensor_contents(tensors, path, "official")


def foreign_adapter_contents(source: AdapterSource, tensors: Mapping[str, torch.Tensor]) -> Contents:
    """Describe an adapter's flat .pth; an ambiguous one by the count of its tensors' names."""
    try:
        return adapter_contents(source)
    except UserError as error:
        names = Counter(split[1] for key in tensors if (split := adapter_parameter(key)))
        parameters = ", ".join(f"{count} {name}" for name, count in names.items())
        return Contents([("kind", f"adapter of RWKV-PEFT: {parameters}"), *numbers(tensors), ("not read", str(error))])


def adapter_contents(source: AdapterSource) -> Contents:
    """Describe an adapter. Raises UserError if it cannot be read."""
    adapter = source.read()
    metadata, method = adapter.metadata, adapter.metadata.method
    modules, whole = adapter.modules(), adapter.whole()
    lines = [("kind", f"adapter, written by {metadata.source.strip()}")]
    if method is not None:
        scale = f", scale {metadata.scale:g} (alpha {metadata.alpha:g})" if method.alpha is not None else ""
        lines += [
            ("method", f"{method.label}, {metadata.size_words}{scale}"),
            ("layers", f"{len(modules)}: {' '.join(map(short, metadata.targets))}"),
        ]
    if whole:
        states = [key for key in whole if is_time_state(key)]
        others, shifts = len(whole) - len(states), " (shifts among them)" if "shift" in state_parts(states) else ""
        parts = [f"{counted(others, 'tensor')} of the base"] if others else []
        parts += [f"{counted(len(states), 'state')}" + shifts] if states else []
        lines.append(("trained whole", " and ".join(parts)))
    lines += [
        *numbers(adapter.tensors),
        ("trained on", f"{metadata.precision or 'a dtype that is not told'}, --quant {metadata.quant}"),
        ("base", metadata.base_words),
    ]
    origin = asdict(metadata.origin)
    lines += [(name, origin[name]) for name in ("tokenizer", "data", "rate", "versions") if origin[name]]
    return Contents(lines, adapter, ADAPTER)


def tensor_contents(tensors: dict[str, torch.Tensor], path: Path, names: str) -> Contents:
    """Describe tensors under official keys: a model, or time states only; `names` is the origin of the file's names."""
    states = {key: tensor for key, tensor in tensors.items() if is_time_state(key)}
    if len(states) == len(tensors):
        check_time_states(states, path)
        wkv = [f", (heads, N, N) = {tuple(tensor.shape)}" for key, tensor in states.items() if key.endswith(WKV)]
        kind = f"time states of {layers_of(states)}{''.join(wkv[:1])}"
        what = SHIFTED if "shift" in state_parts(states) else STATES
        return Contents([("kind", kind), *numbers(tensors)], None, what)
    try:
        base = base_of(tensors, path)
    except UserError as error:
        keys = ", ".join(map(short, list(tensors)[:SHOWN]))
        return Contents([("kind", "foreign"), *numbers(tensors), ("keys", f"{keys}, …"), ("not read", str(error))])
    lines = [
        ("kind", f"model, {base.family.name} ({base.family.version}), {names} names"),
        ("dimensions", ", ".join(f"{name} {value}" for name, value in asdict(base.config).items())),
        *numbers(tensors),
        ("fingerprint", base.fingerprint),
    ]
    if states:
        lines.append(("states", f"tuned, of {layers_of(states)}"))
    return Contents(lines, base, MODEL)


def layers_of(states: Mapping[str, torch.Tensor]) -> str:
    """The number of layers of {key: time state}, and a remark on shifts."""
    layers = counted(len({key.split(".")[1] for key in states}), "layer")
    return layers + " (with shifts, from which only rwkv-peft starts)" * ("shift" in state_parts(states))


def numbers(tensors: Mapping[str, torch.Tensor]) -> Iterator[Line]:
    """Yield two lines: the count of numbers and tensors, and the dtypes."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[dtype_name(tensor.dtype)] += tensor.numel()
    yield "parameters", f"{sum(sizes.values()):,} in {len(tensors):,} tensors"
    yield "dtype", shares(sizes)


def shares(sizes: Mapping[str, int]) -> str:
    """Write {dtype: count of numbers}: "bfloat16", or "bfloat16 (1,000), float32 (24)"."""
    return next(iter(sizes)) if len(sizes) == 1 else ", ".join(f"{name} ({size:,})" for name, size in sizes.items())


def gguf_contents(path: Path) -> Contents:
    """Describe a GGUF by its size alone, because the gguf package has a command for its header."""
    with open(require_file(path), "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is no GGUF: it does not begin as one; copy it again")
    size = f"{path.stat().st_size:,} bytes; gguf-dump of the gguf package prints its header"
    return Contents([("kind", "GGUF"), ("size", size)])


def formatted(lines: Iterable[Line]) -> str:
    """Join lines into a text with their values aligned."""
    pairs = list(lines)
    width = max(len(name) for name, _ in pairs) + 2
    return "\n".join(f"{name:<{width}}{in_line(text)}" for name, text in pairs)
