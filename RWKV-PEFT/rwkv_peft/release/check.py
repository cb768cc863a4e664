"""Check that a merged model computes in a foreign runtime what base plus adapter compute in ours.

    rwkv-peft check --base_model base.pth --bone_checkpoint adapter.safetensors --merged merged.pth
    rwkv-peft check --merged merged.pth --runtimes

Reads one random token sequence with base and adapter layers here, with the merged file here, and with the merged file
in the `rwkv` package, all in float32 on the CPU, and compares their logits. A single wrong value may not show in the
logits, so each tensor is compared as well. Here the files stay mapped, and one block at a time becomes float32; the
`rwkv` package holds a float32 copy, in a process of its own for RWKV-7.
"""

import argparse
import importlib.util
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..adapters.inject import inject, load_tensors
from ..checkpoints.adapter_file import Adapter
from ..checkpoints.adapters import source_of
from ..checkpoints.atomic import scratch_folder
from ..checkpoints.base import Base, open_base
from ..checkpoints.state_file import read_states
from ..checkpoints.tensors import save_pth
from ..cli.errors import UserError, told
from ..cli.parser import counted
from ..models.state import State, split_time_states, state_of
from .differences import differences
from .flags import check_flags
from .merge import Merge, check_fingerprints
from .runtimes import (
    NOT_LOOKED_FOR,
    Difference,
    logits_by_parts,
    random_tokens,
    reference_logits,
    refused_by_rwkv,
    rwkv_sequence,
)
from .verify import runtimes_agree

SAME_FILE = 1e-4  # relative difference allowed between two float32 programs that read the same weights
ROUNDED = 5e-2  # the same between a merged file and the unmerged float32 sum that it rounds to its dtype
NEITHERS = ", which neither the base nor the adapter holds"
SHOWN = 10  # differences of tensors that are printed


def adapted_logits(
    base: Base, loaded: Adapter, adapter: str, tokens: torch.Tensor, states: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Compute the logits (T, V) of a Base over tokens (T,), in float32, with an Adapter; `adapter` names its file.

    The sequence starts from the adapter's time states, else from `states`, else from zeros.
    """
    family, metadata, modules = base.family, loaded.metadata, loaded.modules()
    whole, tuned = split_time_states(loaded.whole())
    config = replace(loaded.config(family), train_parts=())  # tensors that trained whole take the base's places
    # quantized, or less its first factors, in the dtype that the training had
    rounded = metadata.quant != "none" or (metadata.method is not None and metadata.method.residual is not None)

    def adapt(name: str, part: torch.nn.Module) -> None:
        prefix = f"blocks.{name}."
        names = tuple(module for module in modules if module.startswith(prefix))
        if not names:
            return
        for module in names if rounded else ():
            weight = base.tensors[f"{module}.weight"]
            part.get_submodule(module.removeprefix(prefix)).to(metadata.base_dtype() or weight.dtype)
        model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleDict({name: part})})  # with its name in the whole one
        inject(model, config, names, initial=loaded.tensors)
        part.float()
        own = {f"{module}.{name}": tensor for module in names for name, tensor in modules[module].items()}
        load_tensors(model, own, adapter)

    start = State.zeros(base.config, 1)
    if tuned or states:
        start = state_of(tuned or states, start, family.rows_are_keys, adapter)
    return logits_by_parts(family.load(base.tensors | whole, base.config), tokens, start, torch.float32, adapt)


def runtime_logits(base: Base, tokens: torch.Tensor) -> torch.Tensor:
    """Compute the logits (T, V) of a Base over tokens (T,) in float32 with the `rwkv` package.

    The package reads a copy with the embeddings of these tokens alone, the first in float32, because it folds
    blocks.0.ln0 into it in the file's own dtype; it casts the rest itself. Raises UserError if the package is missing
    or fails.
    """
    if importlib.util.find_spec("rwkv") is None:
        raise UserError("check asks the rwkv package, which is not installed: pip install rwkv")
    embeddings = ("emb.weight", *base.family.tables)
    tensors = {key: tensor[tokens] if key.endswith(embeddings) else tensor for key, tensor in base.tensors.items()}
    folded = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias")
    dtypes = {key: torch.float32 if key in folded else tensor.dtype for key, tensor in tensors.items()}
    with scratch_folder() as folder:
        copy = folder / "model.pth"
        save_pth(copy, tensors, dtypes)
        try:
            return rwkv_sequence(copy, torch.arange(len(tokens)), base.config)
        except Exception as error:
            raise UserError(
                f"the rwkv package cannot compute {base.path} ({told(error, named=True)}); --runtimes asks the "
                "others, too"
            ) from error


def main(argv: list[str]) -> int:
    """Print the comparison with base and adapter, and the table of --runtimes; return 0 if all agree, else 1."""
    args = check_flags(argv)
    checks = [made_of_adapter] * bool(args.bone_checkpoint) + [runtimes_agree] * args.runtimes
    return int(not all([check(args) for check in checks]))


def made_of_adapter(args: argparse.Namespace) -> bool:
    """Print the comparisons of a merged model with base and adapter; return True if all logits and tensors agree."""
    merged, base = open_base(args.merged), open_base(args.base_model)
    if reason := refused_by_rwkv(merged.config):
        raise UserError(
            f"{args.merged} is an {merged.family.name}, and check asks the rwkv package, which {reason}; compare the "
            "answers of rwkv-peft generate, to the merged file and to the base with the adapter"
        )
    if merged.config != base.config:
        raise UserError(
            f"{args.merged} and {args.base_model} differ in their dimensions, {merged.config} and {base.config}, so "
            "that neither was made of the other; give the base of the merge"
        )
    tokens = random_tokens(base.config.vocab_size, args.tokens)
    adapter = source_of(args, args.bone_checkpoint).read(base.tensors)
    Merge(base, [(args.bone_checkpoint, adapter)])  # raises UserError for an adapter that cannot be merged
    if not args.any_base:
        check_fingerprints(base, [(args.bone_checkpoint, adapter)])
    if args.state:
        file = read_states(args.state)
        file.check_base(base)
        merged = file.added_to(merged)
    states = split_time_states(merged.tensors)[1]
    if split_time_states(adapter.tensors)[1] and not states:
        raise UserError(
            f"{args.bone_checkpoint} holds time states, and {args.merged} none; give the file that the merge wrote "
            "them to as --state"
        )
    if states:
        foreign = "" if states.keys() <= base.tensors.keys() | adapter.tensors.keys() else NEITHERS
        print(f"time states: the merged model starts from those of {args.state or args.merged}{foreign}")
        if not merged.family.states_in_model:
            print(NOT_LOOKED_FOR.format(merged.family.name))
    ours = reference_logits(merged, tokens, torch.float32)
    theirs = runtime_logits(merged, tokens)
    unmerged = adapted_logits(base, adapter, args.bone_checkpoint, tokens, states)
    comparisons = (
        ("merged file, rwkv package and ours", Difference.between(theirs, ours), SAME_FILE),
        ("merged file and base with adapter on", Difference.between(ours, unmerged), ROUNDED),
    )
    for text, difference, limit in comparisons:
        print(f"{text}: {difference}" + ("" if difference.relative <= limit else f", MORE THAN {limit:.0e}"))
    agree = all(difference.relative <= limit for _, difference, limit in comparisons)  # False for NaN
    found = differences(merged, base, adapter)
    for line in found[:SHOWN]:
        print(f"DIFFERS  {line}")
    if len(found) > SHOWN:
        print(f"and {len(found) - SHOWN} more differences")
    if not found:
        print(f"{counted(len(base.tensors), 'tensor')}: each as base and adapter make it")
    return agree and not found
