"""Plans of a small model."""

from rwkv_peft.tools.plan.flags import parse_flags
from rwkv_peft.tools.plan.parts import GPU, Estimate
from rwkv_peft.training.flags.request import request_of

NEW = ("--n_layer", "4", "--n_embd", "64", "--vocab_size", "80", "--dim_ffn", "256", "--ctx_len", "128")


def estimate(*flags, accelerator=GPU):
    return Estimate.of(request_of(parse_flags([*NEW, *flags])).config, accelerator)
