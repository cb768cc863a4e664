"""Plans of a small model."""

from rwkv_peft.tools.plan.command import estimate_of, parse_flags
from rwkv_peft.tools.plan.memory import GPU

NEW = ("--n_layer", "4", "--n_embd", "64", "--vocab_size", "80", "--dim_ffn", "256", "--ctx_len", "128")


def estimate(*flags, accelerator=GPU):
    return estimate_of(parse_flags([*NEW, *flags]), accelerator)
