"""Accept flags of RWKV-LM's and RWKV-PEFT's scripts that set nothing here: most accept only the values that ask for
what training does anyway."""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import suppress

from ...cli import finite
from ...errors import short

# (flag, the values that ask for what training does anyway, what another value asks for)
LEGACY = (
    ("op", ("cuda", "fla", "triton"), "other kernels, and the device chooses them here"),
    ("pre_ffn", ("0",), "a feed-forward layer in place of the first attention, which RWKV-6 and RWKV-7 do not have"),
    ("head_qk", ("0",), "a copying head, which RWKV-6 and RWKV-7 do not have"),
    ("tiny_att_dim", ("0",), "a tiny attention, which RWKV-6 and RWKV-7 do not have"),
    ("my_pos_emb", ("0",), "position embeddings, which RWKV-6 and RWKV-7 do not have"),
    ("head_size_divisor", ("8",), "another epsilon of ln_x, and RWKV-6 and RWKV-7 have that of 8"),
    ("dropout", ("0",), "dropout in the model; lora_dropout in --lora_config is that of LoRA"),
    ("weight_decay_final", ("-1",), "a weight decay that changes, and it is constant here"),
    ("my_qa_mask", ("0",), "RWKV-LM's mask of questions; --loss_mask qa is that mask here"),
    ("l2warp_sparse", ("0",), "L2Wrap in a sparse form, and it is dense here"),
    ("load_partial", ("0",), "a base with missing tensors, and a base must be complete here"),
    ("tiny_att_layer", ("-999",), "a tiny attention, which RWKV-6 and RWKV-7 do not have"),
    ("my_ffn_shift", ("1",), "a feed-forward without token shift, which RWKV-6 and RWKV-7 do not have"),
    ("my_att_shift", ("1",), "an attention without token shift, which RWKV-6 and RWKV-7 do not have"),
    ("my_pile_version", ("1",), "another version of RWKV-LM's Pile, and --data_file names the data here"),
    ("my_pile_shift", ("-1", "0"), "another order of RWKV-LM's Pile, and samples come in an order of their own here"),
    ("my_pile_edecay", ("0",), "another fall of the rate on RWKV-LM's Pile; --lr_final and --lr_schedule set it here"),
    ("my_sample_len", ("0",), "samples of another length; --ctx_len sets it here"),
    ("my_random_steps", ("0",), "RWKV-LM's random steps, and samples come in a random order without repetition here"),
    ("my_exit", ("99999999",), "an end after so many epochs; --epoch_count sets it here"),
    ("avg_loss", ("0",), "another mean over the segments of a row, and every token of a step weighs the same here"),
    ("lisa_config", ('{"lisa_r":2,"lisa_k":100}',), "LISA, which is no method here; --peft names those that are"),
    ("merge", ("0",), "a merged model at each save; --merge_on_save writes one here"),
    ("enable_progress_bar", ("True", "False"), "something else than a progress bar, which only a terminal shows"),
)
# flags that are accepted and ignored, and why: those with any number, and those without a value
NUMBERS = (
    ("ds_bucket_mb", "the size of communication buckets follows from what trains"),
    ("num_workers", "the data is mapped from its file, and no processes load it"),
    ("prefetch_factor", "the data is mapped from its file, and no processes load it ahead"),
)
SWITCHES = (
    ("fla", "the device chooses the kernels, and all compute the same"),
    ("fused_kernel", "the device chooses the kernels, and all compute the same"),
    ("persistent_workers", "no processes load the data"),
)


def add_legacy_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of LEGACY, NUMBERS and SWITCHES to a parser, in a group of their own."""
    group = parser.add_argument_group("flags of RWKV-LM's and RWKV-PEFT's scripts, which set nothing here")
    for flag, values, asked in LEGACY:
        words = f"accepts only {' or '.join(values)}: another value asks for {asked}"
        group.add_argument(f"--{flag}", type=inert(values, asked), metavar="|".join(values), help=words)
    for flag, why in NUMBERS:
        words = f"accepts any number and ignores it, because {why}"
        group.add_argument(f"--{flag}", type=finite, metavar="N", help=words)
    for flag, why in SWITCHES:
        group.add_argument(f"--{flag}", action="store_true", help=f"is accepted and ignored, because {why}")


def inert(values: Sequence[str], asked: str) -> Callable[[str], str]:
    """Make an argparse type that takes only `values`, numbers and JSON in any spelling."""

    def parse(text: str) -> str:
        if not any(text == value or _meaning(text) == _meaning(value) is not None for value in values):
            raise argparse.ArgumentTypeError(
                f"{short(text)!r} asks for {asked}; give {' or '.join(values)}, or leave the flag out"
            )
        return text

    return parse


def _meaning(text: str) -> object:
    """The number or JSON object that a text spells, or None."""
    for read in (float, json.loads):
        with suppress(ValueError, RecursionError):
            return read(text)
    return None
