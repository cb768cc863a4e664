"""Accept flags of RWKV-LM's and RWKV-PEFT's scripts that set nothing here: each may have the values that ask for what
training does anyway, and no others."""

import argparse
import json
from collections.abc import Callable, Sequence

from ...errors import short

ANY = ("N",)  # the values of a flag that sets nothing here, whatever number it gives
# (flag, the values that change nothing, what any other value asks for)
LEGACY = (
    ("op", ("cuda", "fla", "triton"), "other kernels; those here are chosen by the device"),
    ("pre_ffn", ("0",), "a feed-forward layer in place of the first attention, which RWKV-6 and RWKV-7 do not have"),
    ("head_qk", ("0",), "a copying head, which RWKV-6 and RWKV-7 do not have"),
    ("tiny_att_dim", ("0",), "a tiny attention, which RWKV-6 and RWKV-7 do not have"),
    ("my_pos_emb", ("0",), "position embeddings, which RWKV-6 and RWKV-7 do not have"),
    ("head_size_divisor", ("8",), "another epsilon of ln_x, and RWKV-6 and RWKV-7 have that of 8"),
    ("dropout", ("0",), "dropout in the model; LoRA's is lora_dropout in --lora_config"),
    ("weight_decay_final", ("-1",), "a weight decay that changes; it is constant here"),
    ("my_qa_mask", ("0",), "RWKV-LM's mask of questions; give --loss_mask qa"),
    ("l2warp_sparse", ("0",), "L2Wrap in a sparse form; it is dense here"),
    ("load_partial", ("0",), "a base with tensors missing, and a base is complete here"),
    ("tiny_att_layer", ("-999",), "a tiny attention, which RWKV-6 and RWKV-7 do not have"),
    ("my_ffn_shift", ("1",), "a feed-forward without token shift, which RWKV-6 and RWKV-7 do not have"),
    ("my_att_shift", ("1",), "an attention without token shift, which RWKV-6 and RWKV-7 do not have"),
    ("my_pile_version", ("1",), "another version of RWKV-LM's Pile; the data is what --data_file names"),
    ("my_pile_shift", ("-1", "0"), "RWKV-LM's way through the Pile; here an order without repetition is made"),
    ("my_pile_edecay", ("0",), "RWKV-LM's way through the Pile; --lr_final and --lr_schedule say how the rate falls"),
    ("my_sample_len", ("0",), "another length of the samples; --ctx_len sets it"),
    ("my_random_steps", ("0",), "RWKV-LM's random steps; samples come in a random order without repetition"),
    ("my_exit", ("99999999",), "an end after so many epochs; --epoch_count sets it"),
    ("ds_bucket_mb", ANY, "buckets of communication, whose size follows from what trains; a number is taken"),
    ("avg_loss", ("0",), "another mean of an infinite context's chunks; every token of a step weighs the same here"),
    ("lisa_config", ('{"lisa_r":2,"lisa_k":100}',), "LISA, a method that is not here; --peft names those that are"),
    ("merge", ("0",), "a merged model at each save; give --merge_on_save"),
    ("optim", ("none",), "another optimizer; it is AdamW here"),
    ("enable_progress_bar", ("True", "False"), "a progress bar, which is drawn on a terminal alone"),
    ("num_workers", ANY, "processes that load data, which is mapped from its file here; a number is taken"),
    ("prefetch_factor", ANY, "batches loaded ahead, which are mapped from their file here; a number is taken"),
)
SWITCHES = (
    ("fla", "other kernels, which compute the same"),
    ("fused_kernel", "other kernels, which compute the same"),
    ("persistent_workers", "processes that load data, of which there are none here"),
)


def add_legacy_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of LEGACY, and SWITCHES, to a parser, in a group of their own."""
    group = parser.add_argument_group("flags of RWKV-LM's and RWKV-PEFT's scripts, which set nothing here")
    for flag, values, otherwise in LEGACY:
        group.add_argument(
            f"--{flag}",
            type=inert(values, otherwise),
            default=None,
            metavar="|".join(values),
            help=f"anything else is refused: it asks for {otherwise}",
        )
    for flag, what in SWITCHES:
        group.add_argument(f"--{flag}", action="store_true", help=what)


def inert(values: Sequence[str], otherwise: str) -> Callable[[str], str]:
    """Make an argparse type that takes only `values`, numbers and JSON in any spelling; with ANY, every number."""

    def parse(text: str) -> str:
        same = any(text == value or _meaning(text) == _meaning(value) is not None for value in values)
        if not same and not (values is ANY and isinstance(_meaning(text), float)):
            raise argparse.ArgumentTypeError(
                f"{short(text)!r} asks for {otherwise}; give {' or '.join(values)}, or leave the flag out"
            )
        return text

    return parse


def _meaning(text: str) -> object:
    """The number or JSON object that a text spells, or None."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
