"""--compile: torch.compile over the blocks of a model."""

import torch

from ..models.parts import LanguageModel

FORMS = 64  # in which one block's code is compiled


def compile_blocks(model: LanguageModel) -> None:
    """Have torch.compile make each block of a model at its first call, in every form that a run calls one in: the
    first, the last and those between, with a gradient and without, as they train and as they validate, with their
    adapters and as the base, for a first length of rows and for all. These are more than torch's 8, behind which it
    leaves blocks as they are; which of them would depend on the order, so that a resumed run had other bits."""
    torch._dynamo.config.cache_size_limit = FORMS  # recompile_limit, by the name that torch 2.6 knows
    for block in model.blocks:
        block.compile()
