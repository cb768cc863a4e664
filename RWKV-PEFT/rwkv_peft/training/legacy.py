"""Flags of RWKV-LM's and RWKV-PEFT's scripts that set nothing here: each is taken at the values at which it says what
training does anyway, and refused at any other."""

import argparse

# (flag, the values that change nothing, what any other value asks for)
LEGACY = (
    (
        "train_type",
        ("none", "finetune"),
        "another way to train (time states, infinite context), which train.py does not have",
    ),
    ("op", ("cuda", "fla"), "a kernel for another model; those of wkv6 here are chosen by the device"),
    ("pre_ffn", ("0",), "a feed-forward layer in place of the first attention, which x060 models do not have"),
    ("head_qk", ("0",), "a copying head, which x060 models do not have"),
    ("tiny_att_dim", ("0",), "a tiny attention, which x060 models do not have"),
    ("my_pos_emb", ("0",), "position embeddings, which x060 models do not have"),
    ("head_size_divisor", ("8",), "another epsilon of ln_x, and x060 models have that of 8"),
    ("dropout", ("0",), "dropout in the model; LoRA's is lora_dropout in --lora_config"),
    ("weight_decay_final", ("-1",), "a weight decay that changes; it is constant here"),
    ("my_pile_stage", ("0",), "RWKV-LM's way through the Pile; --epoch_count and --epoch_steps set the length"),
    ("magic_prime", ("0",), "RWKV-LM's order of the data; here an order without repetition is made for any data"),
    ("my_qa_mask", ("0",), "RWKV-LM's mask of questions; give --loss_mask qa"),
    ("l2warp_sparse", ("0",), "L2Wrap in a sparse form; it is dense here"),
    ("optim", ("none",), "another optimizer; it is AdamW here"),
)


def add_legacy_flags(parser):
    """Add the flags of LEGACY, and --fla, to a parser, in a group of their own."""
    group = parser.add_argument_group("flags of RWKV-LM's and RWKV-PEFT's scripts, which set nothing here")
    for flag, values, otherwise in LEGACY:
        group.add_argument(
            f"--{flag}",
            type=inert(values, otherwise),
            default=None,
            metavar="|".join(values),
            help=f"anything else is refused: it asks for {otherwise}",
        )
    group.add_argument("--fla", action="store_true", help="another kernel of wkv6, which computes the same")


def inert(values, otherwise):
    """An argparse type that takes one of `values` alone, numbers in any spelling."""

    def parse(text):
        if not any(text == value or _number(text) == _number(value) is not None for value in values):
            raise argparse.ArgumentTypeError(
                f"{text!r} asks for {otherwise}; give {' or '.join(values)}, or leave the flag out"
            )
        return text

    return parse


def _number(text):
    """The number that a text spells, or None."""
    try:
        return float(text)
    except ValueError:
        return None
