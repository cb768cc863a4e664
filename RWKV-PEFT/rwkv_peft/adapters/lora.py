"""LoRA (Hu et al. 2021, arXiv 2106.09685)."""

from . import low_rank
from .method import Alpha, Method, Tensors, Upstream, rank_up_to


def remark(rank: int, scale: float) -> str:
    return (
        f"RWKV-PEFT's LoRA files do not hold alpha: it is {scale * rank:g}; give it to the "
        "merge, RWKV-PEFT's or merge_bone.py's (--lora_alpha)\n"
    )


METHOD = Method(
    name="lora",
    tensors=Tensors(
        ("lora_A", "lora_B"), ("rank",), low_rank.shapes, low_rank.sizes, rank_up_to(min), idle=("lora_A",)
    ),
    change=low_rank.LOW_RANK,
    apply=low_rank.apply,
    draw=low_rank.draw,
    alpha=Alpha(),
    step=low_rank.step,
    lora=low_rank.as_lora,
    upstream=Upstream(remark=remark),
)
