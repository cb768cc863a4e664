"""Check that a merged model computes in a foreign runtime what base plus adapter compute in ours.

    rwkv-peft check --base_model base.pth --bone_checkpoint adapter.safetensors --merged merged.pth

Reads one random token sequence with base and adapter layers here, with the merged file here, and with the merged file
in the `rwkv` package, all in float32 on the CPU, and compares their logits. A single wrong value may not show in the
logits, so each tensor is compared as well. Needs memory for two float32 copies.
"""

import importlib.util
from collections.abc import Mapping

import torch

from ..adapters.inject import inject, load_tensors
from ..cli import counted
from ..errors import UserError, told
from ..files.adapter_file import Adapter
from ..files.adapters import source_of
from ..files.atomic import scratch_folder
from ..files.base import Base, open_base
from ..files.pth_writer import save_pth
from ..files.state_file import read_states
from ..models.state import State, split_time_states, state_of
from .differences import differences
from .flags import check_flags
from .merge import Merge, check_fingerprints
from .runtimes import NOT_LOOKED_FOR, Difference, random_tokens, reference_logits, refused_by_rwkv, rwkv_sequence

SAME_FILE = 1e-4  # relative difference allowed between two float32 programs that read the same weights
ROUNDED = 5e-2  # the same between a merged file and the unmerged float32 sum that it rounds to its dtype
NEITHERS = ", which neither the base nor the adapter holds"
SHOWN = 10  # differences of tensors that are printed


def adapted_logits(
    base: Base, loaded: Adapter, name: str, tokens: torch.Tensor, states: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Compute the logits (T, V) of a Base over tokens (T,), in float32, with the layers of an Adapter called `name`.

    The sequence starts from the adapter's time states, else from `states`, else from zeros.
    """
    model = base.family.load(base.tensors, base.config).float()
    metadata = loaded.metadata
    if metadata.quant != "none" or (metadata.method is not None and metadata.method.residual is not None):
        for module in loaded.modules():  # quantized, or less its first factors, in the dtype that the training had
            model.get_submodule(module).to(metadata.base_dtype() or base.tensors[f"{module}.weight"].dtype)
    inject(model, loaded.config(base.family), family=base.family, initial=loaded.tensors)
    model.float()
    own, tuned = split_time_states(loaded.tensors)
    if own:
        load_tensors(model, own, name)
    start = State.zeros(base.config, 1)
    if tuned or states:
        start = state_of(tuned or states, start, base.family.rows_are_keys, name)
    with torch.inference_mode():
        return model(tokens[None], start)[0][0]


def runtime_logits(base: Base, tokens: torch.Tensor) -> torch.Tensor:
    """Compute the logits (T, V) of a Base over tokens (T,) in float32 with the `rwkv` package.

    The package reads a float32 copy, because it folds blocks.0.ln0 into the embedding in the file's own dtype. Raises
    UserError if the package is missing or fails.
    """
    if importlib.util.find_spec("rwkv") is None:
        raise UserError("check asks the rwkv package, which is not installed: pip install rwkv")
    with scratch_folder() as folder:
        copy = folder / "float32.pth"
        save_pth(copy, base.tensors, dict.fromkeys(base.tensors, torch.float32))
        try:
            return rwkv_sequence(copy, tokens, base.config)
        except Exception as error:
            raise UserError(
                f"the rwkv package cannot compute {base.path} ({told(error, named=True)}); rwkv-peft verify asks the "
                "other runtimes"
            ) from error


def main(argv: list[str]) -> int:
    """Print the comparisons; return 0 if all logits and tensors agree, else 1."""
    args = check_flags(argv)
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
    return int(bool(found) or not agree)
