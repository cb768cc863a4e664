"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): LoRA with lora_B learning at lora_plus_ratio times the rate of lora_A.
Its files are LoRA's."""

from dataclasses import replace

from . import lora

METHOD = replace(lora.METHOD, name="lora-plus", saved_as="lora", rates=(("lora_B", "lora_plus_ratio"),))
