"""The merge command behind merge_bone.py: its checks, writing and summary (flags.py has its flags)."""

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import torch

from ..adapters.methods import METHODS
from ..checkpoints.adapter_file import Adapter
from ..checkpoints.adapters import adapter_of_run, source_of
from ..checkpoints.atomic import atomic_write, check_output, require_room, same_file
from ..checkpoints.base import Base, open_base
from ..checkpoints.state_file import check_state_output, read_states, write_states
from ..checkpoints.tensors import DTYPES, TensorSpec, dtype_name, stream_tensors, write_pth
from ..cli.errors import UserError, in_line
from ..cli.names import NONE
from ..cli.parser import counted
from ..config import forms
from ..gpus import count_gpus
from ..memory import keep_freed_memory
from ..models.state import is_time_state
from .belonging import Adapters, blocks_of, check_unmerge
from .flags import merge_flags
from .merge import Merge, MergeOptions, TensorReport, check_fingerprints, quantization_error

# RWKV-PEFT's --type -> the variants of it in files' metadata
TYPES = MappingProxyType(
    {
        "bone": forms("bone"),
        "disha": forms("bone"),
        "lora": tuple(name for name, method in METHODS.items() if method.alpha is not None and method.held is None),
        "pissa": ("pissa",),
        "state": (NONE,),
    }
)


def main(argv: list[str]) -> int:
    args = merge_flags(argv)
    args.adapters = [str(adapter_of_run(path, tell=True)) for path in args.adapters]
    check_files(args)
    if args.device == "cuda" and not count_gpus("leave --device out to merge on the CPU"):
        raise UserError("--device cuda: this torch sees no CUDA device; leave --device out to merge on the CPU")
    base = open_base(args.base_model)
    adapters = [(path, source_of(args, path).read(base.tensors)) for path in args.adapters]
    check_type(args.type, adapters)
    options = MergeOptions(args.scale, DTYPES.get(args.output_dtype), args.quant, args.unmerge, args.device)
    merge = Merge(base, adapters, options)
    if not args.any_base:
        (check_unmerge if args.unmerge else check_fingerprints)(base, adapters)
    print_head(args, base, adapters)
    if args.state_output:
        check_separate(args.state_output, args.output, merge, inputs_of(args))
    elif any(map(is_time_state, merge.specs)):
        print(note_inside(base))
    del base  # its pages would stay resident
    keep_freed_memory()  # bands are computed in temporaries of the same few sizes
    reports: list[TensorReport] = []
    states: dict[str, torch.Tensor] = {}  # for --state_output
    outputs = merge.bands(stream_tensors(args.base_model), reports.append)
    if args.dry_run:
        for _ in outputs:
            pass
    else:
        specs = merge.specs
        require_room("--output", args.output, sum(spec.numel * spec.dtype.itemsize for spec in specs.values()))
        if args.state_output:
            specs = {key: spec for key, spec in specs.items() if not is_time_state(key)}
            outputs = diverted(outputs, states)
        with atomic_write(args.output) as temporary:
            write_pth(temporary, specs, outputs)
            if args.state_output:
                write_states(args.state_output, states)
                print(f"states   {args.state_output}: {len(states)} time states, left out of the model's file")
    print_reports(reports, merge.specs)
    if args.dry_run:
        print("dry run: nothing was written")
        return 0
    if args.read_back:
        read_back(args.output, merge, args.base_model, specs)
        if args.state_output:
            check_written(args.state_output, states)
    print(f"wrote {args.output}: {len(specs)} tensors, {os.path.getsize(args.output):,} bytes")
    return 0


def check_type(told: str | None, adapters: Sequence[tuple[str, Adapter]]) -> None:
    """Raise UserError if --type contradicts what the (path, Adapter) pairs hold."""
    for path, adapter in adapters:
        variant = adapter.metadata.variant
        if told and variant not in TYPES[told]:
            is_state = any(is_time_state(key) for key in adapter.tensors)
            kind = "time states" if is_state else "whole tensors" if variant == NONE else f"a {variant} adapter"
            raise UserError(f"--type {told} contradicts {path}, which holds {kind}; leave --type out")


def check_files(args: argparse.Namespace) -> None:
    """Raise UserError if an adapter is given twice, or if the output is no .pth, is one of the inputs by any name or
    link, or cannot be written."""
    for position, path in enumerate(args.adapters):
        if any(same_file(path, other) for other in args.adapters[:position]):
            raise UserError(
                f"--bone_checkpoint names {path} twice, which would apply it twice; give each adapter once "
                "(--scale 2 doubles a change)"
            )
    if args.dry_run:
        return
    if Path(args.output).suffix != ".pth":
        raise UserError(
            f"--output {args.output}: a name that ends in .pth is due; other formats are made of it by "
            "rwkv-peft convert"
        )
    check_output("--output", args.output, inputs_of(args))


def inputs_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The (flag, path) pairs of the files that are read."""
    inputs = [("--base_model", args.base_model), ("--lora_init", args.lora_init)]
    return inputs + [("--bone_checkpoint", path) for path in args.adapters]


def print_head(args: argparse.Namespace, base: Base, adapters: Adapters) -> None:
    dtypes = "/".join(sorted({dtype_name(tensor.dtype) for tensor in base.tensors.values()}))
    config = base.config
    layers = counted(config.n_layer, "layer")
    print(f"base     {args.base_model}: {base.family.name}, {layers}, {config.n_embd} channels, {dtypes}")
    for name, adapter in adapters:
        metadata, modules, whole = adapter.metadata, adapter.modules(), adapter.whole()
        parts = [f"{metadata.variant} {metadata.size_words} on {counted(len(modules), 'layer')}"] if modules else []
        parts += [f"{len(whole)} whole tensors"] if whole else []
        called = f"its base is called {metadata.origin.base}" if metadata.origin.base else "it does not name its base"
        origin = "" if metadata.base_fingerprint else f" (from {in_line(metadata.source)}; {called})"
        print(f"adapter  {name}: {', '.join(parts)}{origin}")
        if 0 < len(blocks := blocks_of(adapter)) < config.n_layer:
            print(f"blocks   it changes {spans(blocks)} of 0-{config.n_layer - 1}; the others stay as they are")
        if metadata.quant != "none" and args.quant != "none":
            print(
                f"quant    onto the base quantized by {metadata.quant}, as in training; --quant none takes the original"
            )
    if args.quant == "none" and (lost := quantization_error(base, adapters)):
        print(
            "quant    onto the original base, as --quant none says; the base of the training differs from it by "
            f"{lost:.2%}"
        )
    if args.unmerge:
        print(
            f"unmerge  these files do not say if this adapter was merged into {args.base_model}, and with which "
            "--scale; the result is the base only if it was, with this one"
        )


def print_reports(reports: Sequence[TensorReport], specs: Mapping[str, TensorSpec]) -> None:
    """Print a table, at most 80 columns wide, of each layer's relative change and the share that a cast lost."""
    layers: dict[str, dict[str, TensorReport]] = {}
    for report in reports:
        _, number, *rest = report.key.split(".") if report.key.startswith("blocks.") else ("", "-", report.key)
        layers.setdefault(number, {})[".".join(rest).removesuffix(".weight")] = report
    if not reports:
        return
    linear = (key for key, spec in specs.items() if key.endswith(".weight") and len(spec.shape) == 2)
    matrices = {key.split(".", 2)[2].removesuffix(".weight") for key in linear if key.startswith("blocks.")}
    columns = [name for name in dict.fromkeys(name for row in layers.values() for name in row) if name in matrices]
    worst = max(reports, key=lambda report: report.lost)
    has_others = any(name not in columns for row in layers.values() for name in row)
    print("change of each layer, |W' - W| / |W| in percent" + ("; the largest of others" if has_others else ""))
    heads = [*map(short, columns), *(["others"] if has_others else []), *(["cast lost"] if worst.lost else [])]
    print("block" + "".join(f"{head:>{width(head)}}" for head in heads))
    for number, row in layers.items():
        cells = [percent(row[name].change) if name in row else "" for name in columns]
        if has_others:
            others = [report.change for name, report in row.items() if name not in columns]
            cells.append(percent(max(others)) if others else "")
        if worst.lost:
            cells.append(percent(max(report.lost for report in row.values())))
        print(f"{number:>5}" + "".join(f"{cell:>{width(head)}}" for head, cell in zip(heads, cells)))
    changed = [report for report in reports if report.change]
    dtype = specs[worst.key].dtype
    print(
        f"changed {len(changed)} of {counted(len(specs), 'tensor')}"
        + (
            f"; the cast to {dtype_name(dtype)} lost at most {percent(worst.lost)} % of a change ({worst.key})"
            if worst.lost
            else ""
        )
        + ("; --output_dtype fp32 keeps it" if worst.lost > 0.1 and dtype != torch.float32 else "")
    )


def spans(numbers: Iterable[str]) -> str:
    """Write numbers as spans: "0-2, 5"."""
    found: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in found)


def short(name: str) -> str:
    """Shorten a name to the papers' letters: "att.receptance" -> "att.r"."""
    part, _, leaf = name.rpartition(".")
    return f"{part}.{leaf[:1]}" if part else leaf[:6]


def width(head: str) -> int:
    return max(7, len(head) + 1)


def percent(share: float) -> str:
    """Write a share in percent, in at most six characters."""
    value = 100 * share
    return f"{value:.2g}" if value < 10 or value >= 1e5 else f"{value:.0f}"


def read_back(output: str | Path, merge: Merge, base: str | Path, specs: Mapping[str, TensorSpec]) -> None:
    """Compare the file on disk, which has the tensors of specs, with a second computation."""
    written = stream_tensors(output)
    due = (band for band in merge.bands(stream_tensors(base)) if band[0] in specs)
    for key, bands in groupby(due, lambda band: band[0]):
        name, tensor = next(written, ("", torch.empty(0)))
        start, same = 0, name == key and TensorSpec.of(tensor) == merge.specs[key]
        for _, rows in bands:
            same = same and torch.equal(tensor[start : start + len(rows)], rows)
            start += len(rows)
        if not same:
            raise UserError(
                f"{output}: {key} does not read back as it was computed; the disk or the memory is faulty, "
                "do not use this file"
            )
    name = open_base(output).family.name
    print(f"verified {output}: every tensor reads back as computed, and the file is a complete {name} model")


def check_separate(
    path: str | Path, output: str | Path | None, merge: Merge, inputs: Iterable[tuple[str, str]]
) -> None:
    """Raise UserError if --state_output cannot be written, is --output, or would leave one of the files empty."""
    check_state_output("--state_output", path)
    check_output("--state_output", path, list(inputs))
    if output is not None and same_file(path, output):
        raise UserError(f"--state_output and --output are both {path}; give each a file of its own")
    if not any(map(is_time_state, merge.specs)):
        raise UserError(f"--state_output {path}: neither the base nor an adapter holds time states; leave it out")
    if all(map(is_time_state, merge.changes)):
        raise UserError(
            f"--state_output {path}: time states are all that the adapters change, so that --output would be the base; "
            "make a file of the states with `rwkv-peft convert`"
        )


def diverted(
    bands: Iterable[tuple[str, torch.Tensor]], states: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a merge's (key, rows) without time states, which are gathered in `states`."""
    for key, rows in bands:
        if not is_time_state(key):
            yield key, rows
        else:
            states[key] = torch.cat([states[key], rows]) if key in states else rows


def check_written(path: str | Path, states: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError unless the file of states at path reads back as `states`."""
    found = read_states(path).tensors
    if found.keys() != states.keys() or not all(torch.equal(found[key], states[key]) for key in states):
        raise UserError(
            f"{path} does not read back as it was computed; the disk or the memory is faulty, do not use it"
        )


def note_inside(base: Base) -> str:
    """Write a note for users about time states inside a merged model."""
    note = "RWKV-Runner, web-rwkv and Ai00 take states as files of their own: --state_output writes one"
    if not base.family.states_in_model:
        note = f"the rwkv package does not look for them in an {base.family.name} file; {note}"
    return f"states   in the model's file; {note}"
