"""Merge adapters into a base model: `python merge_bone.py --base_model B --bone_checkpoint A --output M`.

merge.py computes; here are the checks of files, the bound of --forget_at_most, and the report.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from ..adapters.methods import METHODS
from ..checkpoints.adapters import adapter_of_run, sources_of
from ..checkpoints.atomic import atomic_write, check_output, require_room, same_file
from ..checkpoints.base import Base, open_base
from ..checkpoints.readable import require_readable
from ..checkpoints.state_file import check_state_output, require_place, write_states
from ..checkpoints.tensors import DTYPES, dtype_name, stream_tensors, write_pth
from ..cli.errors import UserError, in_line
from ..cli.names import NONE
from ..cli.parser import counted
from ..config import DataConfig, forms
from ..data.feedback import scaled
from ..data.recorded import chat_beside, find_tokenizer, recorded_beside
from ..data.samples import Samples
from ..data.sources import build_samples
from ..evals.frontier import MEASURED, merged_frontier, table
from ..gpus import count_gpus
from ..memory import keep_freed_memory
from ..models.layout import is_time_state, state_parts
from .changes import TensorChange, change_table, percent
from .compatibility import Adapters, blocks_of
from .flags import merge_flags
from .merge import Merge, MergeOptions, Pairs, check_fingerprints

LONGEST = 4096  # tokens of a row of --keep; a longer one loses the front of its prompt

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
    base = open_base(args.base_model)
    adapters = [(source.path, source.read(base.tensors)) for source in sources_of(args, args.adapters)]
    check_type(args.type, adapters)
    options = MergeOptions(DTYPES.get(args.output_dtype), args.quant, args.device)
    merge = Merge(base, adapters, options)
    if not args.any_base:
        check_fingerprints(base, adapters)
    check_state_flag(args, merge)
    if args.forget_at_most is not None:
        scale = bounded(args, base, adapters, options)
        if not scale:
            print("nothing is written: each part of the change loses more; replay more in training, or allow more")
            return 1
        adapters = [(name, adapter._replace(amount=adapter.amount * scale)) for name, adapter in adapters]
        merge = Merge(base, adapters, options)
    print_head(args, base, adapters, merge)
    # a .pth is read again, band by band: the pages that base maps would stay resident
    pairs = base.tensors.items() if Path(args.base_model).is_dir() else stream_tensors(args.base_model)
    del base
    keep_freed_memory()  # bands are computed in temporaries of the same few sizes
    changes: list[TensorChange] = []
    bands = merge.bands(pairs, changes.append)
    if args.dry_run:
        for _ in bands:
            pass
        print_changes(changes, merge)
        print("dry run: nothing was written")
        return 0
    specs = merge.specs
    states: dict[str, torch.Tensor] = {}  # for --state_output
    size = sum(spec.numel * spec.dtype.itemsize for spec in specs.values())
    if args.state_output:
        specs = {key: spec for key, spec in specs.items() if not is_time_state(key)}
        bands = without_states(bands, states)
    require_room("--output", args.output, size)
    with atomic_write(args.output) as temporary:
        write_pth(temporary, specs, bands)
        if args.state_output:
            write_states(args.state_output, states)
            print(f"states   {args.state_output}: {len(states)} time states, left out of the model's file")
    print_changes(changes, merge)
    print(f"wrote {args.output}: {len(specs)} tensors, {os.path.getsize(args.output):,} bytes")
    return 0


def check_files(args: argparse.Namespace) -> None:
    """Raise UserError if an adapter is given twice, or if an output is one of the inputs by any name or link, cannot be
    written or has another ending. The device must exist, too."""
    for position, path in enumerate(args.adapters):
        if any(same_file(path, other) for other in args.adapters[:position]):
            raise UserError(
                f"--bone_checkpoint names {path} twice, which would apply it twice; give each adapter once "
                f"({path}=2 doubles its change)"
            )
    inputs = [("--base_model", args.base_model), ("--lora_init", args.lora_init)]
    inputs += [("--bone_checkpoint", path) for path in args.adapters] + [("--keep", args.keep)]
    if args.keep:
        require_readable(args.keep, f"--keep {args.keep}: no such file; it holds rows, such as .jsonl")
    if not args.dry_run:
        if Path(args.output).suffix != ".pth":
            raise UserError(
                f"--output {args.output}: a name that ends in .pth is due; other formats are made of it by "
                "rwkv-peft convert"
            )
        check_output("--output", args.output, inputs)
    if args.state_output:
        check_state_output("--state_output", args.state_output)
        check_output("--state_output", args.state_output, inputs)
        if args.output is not None and same_file(args.state_output, args.output):
            raise UserError(f"--state_output and --output are both {args.state_output}; give each a file of its own")
    if args.device == "cuda" and not count_gpus("leave --device out to merge on the CPU"):
        raise UserError("--device cuda: this torch sees no CUDA device; leave --device out to merge on the CPU")


def bounded(args: argparse.Namespace, base: Base, adapters: Adapters, options: MergeOptions) -> float:
    """The largest scale of the adapters' change at which the rows of --keep lose no more than --forget_at_most; it is
    printed, with what was measured."""
    samples = kept_rows(args, base.config.vocab_size)
    print(f"keep     {args.keep}: {counted(len(samples), 'row')}, of which at most {MEASURED} are measured", flush=True)
    points, best = merged_frontier(base, adapters, samples, args.forget_at_most, options)
    files = " ".join(scaled(str(name), adapter.amount * best.scale) for name, adapter in adapters)
    print(table(points, best))
    print(f"scale    {best.scale:g}, the largest that loses at most {args.forget_at_most:g} nats a token: {files}")
    return best.scale


def kept_rows(args: argparse.Namespace, vocab_size: int) -> Samples:
    """The samples of --keep, laid out as the run's whose adapter is merged."""
    beside = (*args.adapters, args.base_model)
    tokenizer, chat = find_tokenizer(args.tokenizer, vocab_size, recorded_beside(*beside)), chat_beside(*beside)
    config = DataConfig(args.keep, data_type="sft", dataload="pad", loss_mask="file", tokenizer=tokenizer.name)
    config = replace(config, ctx_len=LONGEST, clean_turns=chat.clean, tool_form=chat.tool_form.name)
    return build_samples(config, vocab_size)


def check_type(given: str | None, adapters: Adapters) -> None:
    """Raise UserError if --type contradicts an adapter."""
    for path, adapter in adapters:
        variant = adapter.metadata.variant
        if given and variant not in TYPES[given]:
            is_state = any(is_time_state(key) for key in adapter.tensors)
            kind = "time states" if is_state else "whole tensors" if variant == NONE else f"a {variant} adapter"
            raise UserError(f"--type {given} contradicts {path}, which holds {kind}; leave --type out")


def check_state_flag(args: argparse.Namespace, merge: Merge) -> None:
    """Raise UserError if --state_output would leave one of the two files empty."""
    if not args.state_output:
        return
    if not any(map(is_time_state, merge.specs)):
        raise UserError(
            f"--state_output {args.state_output}: neither the base nor an adapter holds time states; leave it out"
        )
    require_place(args.state_output, merge.specs)
    if all(map(is_time_state, merge.changes)):
        raise UserError(
            f"--state_output {args.state_output}: time states are all that the adapters change, so that --output would "
            "be the base; make a file of the states with `rwkv-peft convert`"
        )


def without_states(bands: Pairs, states: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a merge's (key, rows) without time states, which are gathered in `states`."""
    for key, rows in bands:
        if not is_time_state(key):
            yield key, rows
        else:
            states[key] = torch.cat([states[key], rows]) if key in states else rows


def print_head(args: argparse.Namespace, base: Base, adapters: Adapters, merge: Merge) -> None:
    """Print a line for the base and for each adapter, and remarks about blocks, quantization and states."""
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
        amount = "" if adapter.amount == 1 else f", {adapter.amount:g} times its change"
        print(f"adapter  {name}: {', '.join(parts)}{amount}{origin}")
        if 0 < len(blocks := blocks_of(adapter)) < config.n_layer:
            changed = ", ".join(sorted(blocks, key=int))
            print(f"blocks   it changes {changed} of 0-{config.n_layer - 1}; the others stay as they are")
        if metadata.quant != "none" and args.quant != "none":
            print(
                f"quant    onto the base quantized by {metadata.quant}, as in training; --quant none takes the original"
            )
    if any(map(is_time_state, merge.specs)) and not args.state_output:
        note = "RWKV-Runner, web-rwkv and Ai00 take states as files of their own: --state_output writes one"
        if "shift" in state_parts(merge.specs):
            note = "RWKV-Runner, web-rwkv and Ai00 have no place for their shifts, from which only rwkv-peft starts"
        if unread := base.family.unread_states(merge.specs):
            note = f"{unread}; {note}"
        print(f"states   in the model's file; {note}")


def print_changes(changes: Sequence[TensorChange], merge: Merge) -> None:
    """Print the table of each layer's relative change, and the share that the cast lost at most."""
    if not changes:
        return
    table = change_table(changes, merge.specs)
    others = "; the largest of others" if " others" in table else ""
    print(f"change of each layer, |W' - W| / |W| in percent{others}\n{table}")
    worst = max(changes, key=lambda change: change.lost)
    line = f"changed {sum(change.change > 0 for change in changes)} of {counted(len(merge.specs), 'tensor')}"
    if worst.lost:
        dtype = merge.specs[worst.key].dtype
        line += f"; the cast to {dtype_name(dtype)} lost at most {percent(worst.lost)} % of a change ({worst.key})"
        line += "; --output_dtype fp32 keeps it" if worst.lost > 0.1 and dtype != torch.float32 else ""
    print(line)
