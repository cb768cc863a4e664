"""Describe a file or folder, and the change of a model from its base: `rwkv-peft inspect FILE`.

A file may hold a model, an adapter or states, in any format that is read here.

    rwkv-peft inspect adapter.safetensors --base_model base.pth --output changes.png
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..adapters.methods import adapter_parameter
from ..checkpoints.adapter_file import METADATA_KEY, Adapter
from ..checkpoints.adapters import AdapterSource, product_of_run, source_of
from ..checkpoints.atomic import check_output
from ..checkpoints.base import Base, base_of, open_base
from ..checkpoints.lightning_folder import is_lightning_folder
from ..checkpoints.peft_folder import is_adapter_folder
from ..checkpoints.rwkv_peft_file import unwrapped
from ..checkpoints.tensors import TensorSpec, dtype_name, read_safetensors, read_tensors
from ..cli.errors import UserError, in_line, short
from ..cli.parser import counted
from ..models.state import check_time_states, is_time_state
from ..plots import plot_changes
from .changes import TensorChange, change_table, place, ratio, square
from .flags import inspect_flags
from .formats import read_hf_model, web_tensors
from .gguf import import_gguf, read_header
from .merge import Merge, MergeOptions, check_fingerprints

Line = tuple[str, str]
MODEL, ADAPTER, STATES, SESSION, UNKNOWN = "model", "adapter", "states", "session", ""  # what a file may hold
SHOWN = 3  # keys of a foreign file that are quoted
LISTED = 64  # values of a GGUF's setting that are shown
CHUNK = 1 << 22  # values compared at a time


def main(argv: list[str]) -> int:
    args = inspect_flags(argv)
    contents = contents_of(source_of(args, args.file))
    if args.output:
        check_output("--output", Path(args.output), [("the file", args.file), ("--base_model", args.base_model)])
    print(formatted(contents.lines))
    if args.base_model is None:
        return 0
    if contents.holds is None:
        raise UserError(f"{args.file} is neither a model nor an adapter that is read here, which --base_model compares")
    base = open_base(args.base_model)
    changes = changes_of(base, contents.holds, args.file)
    specs = {key: TensorSpec.of(tensor) for key, tensor in base.tensors.items()}
    print("\nchange of each tensor from the base, |W' - W| / |W| in %, and the largest of others:")
    print(change_table(changes, specs) if changes else "none: it is the base")
    if any(math.isnan(change.change) for change in changes):
        print("nan: the tensor or the base's holds NaN or Inf; copy the file again, or take an earlier one")
    if args.output:
        cells = {place(change.key): change.change for change in changes if change.key.startswith("blocks.")}
        plot_changes({(int(block), name): change for (block, name), change in cells.items()}, args.output)
        print(f"wrote {args.output}")
    return 0


def changes_of(base: Base, other: Base | Adapter, name: str) -> list[TensorChange]:
    """The TensorChange of each tensor of a Base that a merged model, or an adapter, called `name` changes. Time states
    that only one of two models holds count as zeros in the other."""
    if isinstance(other, Adapter):
        check_fingerprints(base, [(name, other)])
        changes: list[TensorChange] = []
        merge = Merge(base, [(name, other)], MergeOptions(dtype=torch.float32))
        for _ in merge.bands(base.tensors.items(), changes.append):
            pass  # only the changes are needed, before a cast
        return changes
    if other.config != base.config:
        raise UserError(
            f"{base.path} has other dimensions than {name}, so that it is not its base; name the model that it was "
            "made from"
        )
    either = base.tensors | other.tensors
    zeros = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in either.items()}
    before, after = zeros | base.tensors, zeros | other.tensors
    moved = [TensorChange(key, distance(after[key], before[key])) for key in either]
    return [change for change in moved if change.change]


def distance(tensor: torch.Tensor, base: torch.Tensor) -> float:
    """Compute |W' - W| / |W|, CHUNK values at a time."""
    change = size = 0.0
    for new, old in zip(tensor.reshape(-1).split(CHUNK), base.reshape(-1).split(CHUNK)):
        change += square(new.float() - old.float())
        size += square(old.float())
    return ratio(change, size)


class Contents(NamedTuple):
    """The description of a file: lines (name, value); the Base or Adapter in it from which a change can be computed, or
    None; and its kind: MODEL, ADAPTER, STATES, SESSION or UNKNOWN."""

    lines: list[Line]
    holds: Base | Adapter | None = None
    what: str = UNKNOWN


def contents_of(source: AdapterSource) -> Contents:
    """Read the Contents of source.path, a file or a folder. Raises UserError if it holds no tensors at all."""
    path = product_of_run(source.path, tell=True)
    source = replace(source, path=path)
    if path.suffix == ".gguf":
        lines = list(gguf_lines(path))
        read = ("kind", "GGUF model, rwkv6") in lines or ("kind", "GGUF model, rwkv7") in lines
        return Contents(lines, None, MODEL if read else UNKNOWN)
    if path.is_dir():
        if is_adapter_folder(path) or is_lightning_folder(path):
            return adapter_contents(source)
        return tensor_contents(read_hf_model(path), path, "Hugging Face")
    if path.suffix in (".safetensors", ".st", ".state"):
        tensors, header = read_safetensors(path)
        if METADATA_KEY in header:
            return adapter_contents(source)
        return tensor_contents(web_tensors(tensors), path, "web-rwkv, Ai00")
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
        found = ", ".join(f"{count} {name}" for name, count in names.items())
        return Contents([("kind", f"adapter of RWKV-PEFT: {found}"), *numbers(tensors), ("not read", str(error))])


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
        states = sum(map(is_time_state, whole))
        parts = [f"{counted(len(whole) - states, 'tensor')} of the base"] if len(whole) > states else []
        parts += [counted(states, "state")] if states else []
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
    """Describe tensors under official keys: a model, time states only, or a saved session; `names` is the origin of the
    file's names."""
    states = {key: tensor for key, tensor in tensors.items() if is_time_state(key)}
    if len(states) == len(tensors):
        check_time_states(states, path)
        shape = tuple(next(iter(states.values())).shape)
        kind = f"time states of {counted(len(states), 'layer')}, (heads, N, N) = {shape}"
        return Contents([("kind", kind), *numbers(tensors)], None, STATES)
    if states and all(key in states or key.endswith(".shift") for key in tensors):
        kind = f"session of {counted(len(states), 'layer')}, which generate --state goes on from"
        return Contents([("kind", kind), *numbers(tensors)], None, SESSION)
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
        lines.append(("states", f"tuned, of {counted(len(states), 'layer')}"))
    return Contents(lines, base, MODEL)


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


def gguf_lines(path: Path) -> Iterator[Line]:
    """Describe a GGUF by its header."""
    kinds = {int(kind): kind.name.lower() for kind in import_gguf().GGMLQuantizationType}
    settings, tensors = read_header(path)
    kind, architecture = settings.get("general.type", "model"), settings.get("general.architecture", "unknown")
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[kinds.get(tensor.kind, f"type {tensor.kind}")] += tensor.size
    yield "kind", f"GGUF {kind}, {architecture}"
    yield "parameters", f"{sum(sizes.values()):,} in {len(tensors):,} tensors"
    if sizes:
        yield "dtype", shares(sizes)
    own = (f"{architecture}.", "adapter.")
    shown = {
        name.partition(".")[2]: value[:LISTED] if isinstance(value, list) else value
        for name, value in settings.items()
        if name.startswith(own)
    }
    yield "settings", ", ".join(f"{name} {json.dumps(value)}" for name, value in shown.items())
    if isinstance(tokens := settings.get("tokenizer.ggml.tokens"), list):
        yield "vocabulary", f"{len(tokens):,} tokens"


def formatted(lines: Iterable[Line]) -> str:
    """Join lines into a text with their values aligned."""
    pairs = list(lines)
    width = max(len(name) for name, _ in pairs) + 2
    return "\n".join(f"{name:<{width}}{in_line(text)}" for name, text in pairs)
